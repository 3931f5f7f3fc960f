// The Python module add_ops._C. It knows nothing of torch: arguments are NumPy views of CPU tensors, outputs are
// allocated by the caller. A primitive adds itself by one declaration and one call.
#include <pybind11/pybind11.h>

#include "dispatch.h"

namespace add_ops {

void bind_spectral_distance(pybind11::module_& m);
void bind_attention_sum(pybind11::module_& m);
void bind_view_histogram(pybind11::module_& m);
void bind_project_and_sort(pybind11::module_& m);
void bind_contrastive_loss(pybind11::module_& m);
void bind_quantile_distance(pybind11::module_& m);

}  // namespace add_ops

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of add_ops on NumPy arrays.";
  m.def("cpu_capability", [] { return add_ops::isa_name(add_ops::active_isa()); },
        "The instruction set that answers: 'baseline', 'avx2' or 'avx512' (ADD_OPS_CPU_CAPABILITY forces one).");
  add_ops::bind_spectral_distance(m);
  add_ops::bind_attention_sum(m);
  add_ops::bind_view_histogram(m);
  add_ops::bind_project_and_sort(m);
  add_ops::bind_contrastive_loss(m);
  add_ops::bind_quantile_distance(m);
}
