// project_and_sort: the sort of the projected values with its permutation, and the way back. The projection itself is a
// matrix product and stays in torch.
#include "project_and_sort.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>

#include "arrays.h"
#include "parallel.h"

namespace add_ops {
namespace {

constexpr int64_t kItemValues = 1 << 13;  // a work item holds about so many values, at least one row

void require_rows(const py::array& values, const char* name) {
  require_dtype(values, name, {Dtype::float32, Dtype::float64}, "float32 or float64");
  require_shape(values, name, {-1, -1});
  require_contiguous(values, name);
}

void require_index(const py::array& index, const py::array& values) {
  require_dtype(index, "index", {Dtype::int16, Dtype::int32}, "int16 or int32");
  require_shape(index, "index", {values.shape(0), values.shape(1)});
  require_contiguous(index, "index");
  const int64_t most = dtype_of(index) == Dtype::int16 ? int64_t{1} << 15 : std::numeric_limits<int32_t>::max();
  if (values.shape(1) > most)
    throw py::value_error(
        "index: expected int32 for rows of more than 32768 values (at most 2147483647), got rows of " +
        std::to_string(values.shape(1)));
}

void sort_with_index(py::array values, py::array index, int threads) {
  require_rows(values, "values");
  require_index(index, values);
  const bool wide = dtype_of(values) == Dtype::float64, short_index = dtype_of(index) == Dtype::int16;
  const int64_t rows = values.shape(0), n = values.shape(1);
  char *data = static_cast<char*>(values.mutable_data()), *places = static_cast<char*>(index.mutable_data());
  const py::gil_scoped_release release;
  if (rows == 0 || n == 0) return;
  const auto sort = ADD_OPS_KERNEL(sort_rows);
  const int workers = std::max(threads, 1);
  const std::unique_ptr<char[]> scratch(new char[workers * sort_scratch(n, wide)]);
  const int64_t together = !wide && n <= kNetworkMost ? kRowsMost : 1;
  const int64_t step = together * std::max<int64_t>(1, kItemValues / n / together);
  parallel_for((rows + step - 1) / step, workers, [&](int64_t item, int worker) {
    const int64_t first = item * step, at = first * n;
    sort(wide, short_index, std::min(step, rows - first), n, data + at * (wide ? 8 : 4),
         places + at * (short_index ? 2 : 4), scratch.get() + worker * sort_scratch(n, wide));
  });
}

// False where a row of the index, which is then left out, does not fit.
template <typename Float, typename Index>
bool scatter_rows(int64_t rows, int64_t n, const Float* grad, const Index* index, Float* out, int threads) {
  std::atomic<bool> good{true};
  const int64_t step = std::max<int64_t>(1, kItemValues / n);
  parallel_for((rows + step - 1) / step, threads, [&](int64_t item, int) {
    for (int64_t row = item * step; row < std::min(rows, (item + 1) * step); ++row) {
      const int64_t at = row * n;
      if (!all_inside(index + at, n)) {
        good = false;
        continue;
      }
      for (int64_t i = 0; i < n; ++i) out[at + index[at + i]] = grad[at + i];
    }
  });
  return good;
}

void scatter_by_index(const py::array& grad, const py::array& index, py::array out, int threads) {
  require_rows(grad, "grad");
  require_index(index, grad);
  require_same_dtype(out, "out", grad, "grad");
  require_shape(out, "out", {grad.shape(0), grad.shape(1)});
  require_contiguous(out, "out");
  const bool wide = dtype_of(grad) == Dtype::float64, short_index = dtype_of(index) == Dtype::int16;
  const int64_t rows = grad.shape(0), n = grad.shape(1);
  const void *from = grad.data(), *places = index.data();
  void* to = out.mutable_data();
  const py::gil_scoped_release release;
  if (rows == 0 || n == 0) return;
  const auto scatter = [&](auto zero) {
    using Float = decltype(zero);
    const Float* source = static_cast<const Float*>(from);
    if (short_index)
      return scatter_rows(rows, n, source, static_cast<const int16_t*>(places), static_cast<Float*>(to), threads);
    return scatter_rows(rows, n, source, static_cast<const int32_t*>(places), static_cast<Float*>(to), threads);
  };
  if (!(wide ? scatter(double{}) : scatter(float{}))) throw_outside("permutation", n);
}

}  // namespace

void bind_project_and_sort(py::module_& m) {
  m.def("sort_with_index", &sort_with_index, py::arg("values"), py::arg("index"), py::arg("threads"),
        "Sorts each row of values (rows, N) in place, NaN last; index (rows, N) = the stable permutation.");
  m.def("scatter_by_index", &scatter_by_index, py::arg("grad"), py::arg("index"), py::arg("out"), py::arg("threads"),
        "out[row, index[row, i]] = grad[row, i], for a permutation in each row of the index; others are refused.");
}

}  // namespace add_ops
