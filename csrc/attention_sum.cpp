// attention_sum: a sample's distances, each weighted by its attention; where that leaves the range, a constant instead.
#include "attention_sum.h"

#include <cstring>

#include "arrays.h"
#include "parallel.h"

namespace add_ops {
namespace {

void forward(const py::array& distance, double gamma, double limit, double scale, double most, py::array loss,
             py::array slope, int threads) {
  require_dtype(distance, "distance", {Dtype::float32, Dtype::float64}, "float32 or float64");
  require_shape(distance, "distance", {-1, -1, -1});
  require_contiguous(distance, "distance");
  const auto require_like = [&](const py::array& out, const char* name, const std::vector<py::ssize_t>& shape) {
    require_same_dtype(out, name, distance, "the distance");
    require_shape(out, name, shape);
    require_contiguous(out, name);
  };
  require_like(loss, "loss", {distance.shape(0)});
  require_like(slope, "slope", {distance.shape(0), distance.shape(1), distance.shape(2)});
  const bool wide = dtype_of(distance) == Dtype::float64;
  const int64_t batch = distance.shape(0), count = distance.shape(1) * distance.shape(2),
                bytes = count * (wide ? 8 : 4);
  const char* from = static_cast<const char*>(distance.data());
  char* to = static_cast<char*>(slope.mutable_data());
  void* sums = loss.mutable_data();
  const py::gil_scoped_release release;
  const auto attend = ADD_OPS_KERNEL(attention_sum);
  parallel_for(batch, threads, [&](int64_t b, int) {
    double sum = attend(wide, count, from + b * bytes, gamma, limit, scale, to + b * bytes);
    if (sum > most) {
      sum = most;
      std::memset(to + b * bytes, 0, static_cast<size_t>(bytes));
    }
    set_number(sums, b, wide, sum);
  });
}

}  // namespace

void bind_attention_sum(py::module_& m) {
  m.def("attention_sum", &forward, py::arg("distance"), py::arg("gamma"), py::arg("limit"), py::arg("scale"),
        py::arg("most"), py::arg("loss"), py::arg("slope"), py::arg("threads"),
        "loss (B,) = the sum of slope · distance (B, H, W), slope = scale · exp(min(gamma · distance, limit)); at most "
        "`most`, "
        "where slope is 0.");
}

}  // namespace add_ops
