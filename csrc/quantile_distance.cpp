// quantile_distance: W_p^p between sorted, weighted points on lines, row by row, and its gradients.
#include "quantile_distance.h"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <vector>

#include "arrays.h"
#include "parallel.h"

namespace add_ops {
namespace {

constexpr int64_t kItemSteps = 1 << 13;  // a work item merges about so many levels, at least one row

// One side of the comparison: sorted values, and where there are weights, how they sort.
struct Side {
  int64_t rows, n, slices = 1;
  bool wide, short_order;
  const char *values, *order;
  const double* weights = nullptr;
  std::vector<double> levels;  // shared by all rows where there are no weights

  Side(const py::array& sorted, const py::array& places, const py::object& of_points, const char* name) {
    require_dtype(sorted, name, {Dtype::float32, Dtype::float64}, "float32 or float64");
    require_shape(sorted, name, {-1, -1});
    require_contiguous(sorted, name);
    require_dtype(places, "order", {Dtype::int16, Dtype::int32}, "int16 or int32");
    require_shape(places, "order", {sorted.shape(0), sorted.shape(1)});
    require_contiguous(places, "order");
    rows = sorted.shape(0), n = sorted.shape(1);
    wide = dtype_of(sorted) == Dtype::float64, short_order = dtype_of(places) == Dtype::int16;
    values = static_cast<const char*>(sorted.data()), order = static_cast<const char*>(places.data());
    if (n == 0 || n > std::numeric_limits<int32_t>::max())
      throw py::value_error(std::string(name) + ": expected 1 to 2147483647 values per row");
    if (!of_points.is_none()) {
      const auto array = of_points.cast<py::array>();
      require_dtype(array, "weights", {Dtype::float64}, "float64");
      require_shape(array, "weights", {-1, n});
      require_contiguous(array, "weights");
      if (array.shape(0) == 0 ? rows > 0 : rows % array.shape(0) != 0)
        throw py::value_error("weights: expected a row for as many rows of values each");
      weights = static_cast<const double*>(array.data());
      slices = array.shape(0) == 0 ? 1 : std::max<int64_t>(rows / array.shape(0), 1);
      return;
    }
    levels.resize(n);
    for (int64_t i = 0; i < n; ++i) levels[i] = static_cast<double>(i + 1) / static_cast<double>(n);
  }

  const void* row(int64_t index) const { return values + index * n * (wide ? 8 : 4); }
  const void* order_of(int64_t index) const { return order + index * n * (short_order ? 2 : 4); }
  const double* weights_of(int64_t index) const { return weights ? weights + index / slices * n : nullptr; }
  bool can_order(int64_t index) const {
    if (weights == nullptr) return true;  // the order is not read
    const void* places = order_of(index);
    return short_order ? all_inside(static_cast<const int16_t*>(places), n)
                       : all_inside(static_cast<const int32_t*>(places), n);
  }
};

// Memory of one worker.
struct Scratch {
  std::vector<double> x_levels, y_levels, width, sums;
  std::vector<int32_t> x, y;

  Steps steps(int64_t count) {
    x.resize(count), y.resize(count), width.resize(count);
    return {0, x.data(), y.data(), width.data()};
  }
};

// Calls body(row, its description, sums) for every row; `sums` is scratch of n + m where it is asked for.
template <typename Body>
void for_rows(Side& x, Side& y, double p, int threads, bool with_sums, const Body& body) {
  const bool merged = x.weights == nullptr && y.weights == nullptr;
  Scratch shared;
  Steps steps{};
  if (merged) {
    steps = shared.steps(x.n + y.n);
    ADD_OPS_KERNEL(merge_levels)(x.n, x.levels.data(), y.n, y.levels.data(), &steps);
  }
  const int workers = std::max(threads, 1);
  std::vector<Scratch> scratch(workers);
  for (Scratch& own : scratch) {
    if (x.weights) own.x_levels.resize(x.n);
    if (y.weights) own.y_levels.resize(y.n);
    if (!merged) own.steps(x.n + y.n);
    if (with_sums) own.sums.resize(x.n + y.n);
  }
  std::atomic<bool> x_good{true}, y_good{true};
  const int64_t step = std::max<int64_t>(1, kItemSteps / (x.n + y.n));
  parallel_for((x.rows + step - 1) / step, workers, [&](int64_t item, int worker) {
    Scratch& own = scratch[worker];
    for (int64_t at = item * step; at < std::min(x.rows, (item + 1) * step); ++at) {
      if (!x.can_order(at)) x_good = false;
      if (!y.can_order(at)) y_good = false;
      if (!x_good || !y_good) return;
      QuantileRow row{x.wide,
                      merged,
                      x.short_order,
                      y.short_order,
                      x.n,
                      y.n,
                      x.row(at),
                      y.row(at),
                      x.order_of(at),
                      y.order_of(at),
                      x.weights_of(at),
                      y.weights_of(at),
                      x.weights ? own.x_levels.data() : x.levels.data(),
                      y.weights ? own.y_levels.data() : y.levels.data(),
                      merged ? steps : Steps{0, own.x.data(), own.y.data(), own.width.data()},
                      p};
      body(at, &row, own.sums.data());
    }
  });
  if (!x_good) throw_outside("x_order", x.n);
  if (!y_good) throw_outside("y_order", y.n);
}

void require_alike(const py::array& x, const py::array& y) {
  require_same_dtype(y, "y", x, "x");
  if (x.ndim() != y.ndim() || x.shape(0) != y.shape(0)) throw py::value_error("y: expected as many rows as x");
}

void require_like(const py::array& out, const py::array& model, const char* name) {
  require_same_dtype(out, name, model, "the values");
  require_contiguous(out, name);
}

void forward(const py::array& x, const py::array& y, const py::array& x_order, const py::array& y_order,
             const py::object& x_weights, const py::object& y_weights, double p, py::array out, int threads) {
  Side left(x, x_order, x_weights, "x"), right(y, y_order, y_weights, "y");
  require_alike(x, y);
  require_like(out, x, "out");
  require_shape(out, "out", {x.shape(0)});
  void* to = out.mutable_data();
  const py::gil_scoped_release release;
  const auto distance = ADD_OPS_KERNEL(quantile_row);
  for_rows(left, right, p, threads, false,
           [&](int64_t at, QuantileRow* row, double*) { set_number(to, at, row->wide, distance(row)); });
}

void backward(const py::array& grad, const py::array& x, const py::array& y, const py::array& x_order,
              const py::array& y_order, const py::object& x_weights, const py::object& y_weights, double p,
              py::array x_grad, py::array y_grad, int threads) {
  Side left(x, x_order, x_weights, "x"), right(y, y_order, y_weights, "y");
  require_alike(x, y);
  require_like(grad, x, "grad");
  require_shape(grad, "grad", {x.shape(0)});
  require_like(x_grad, x, "x_grad");
  require_shape(x_grad, "x_grad", {x.shape(0), x.shape(1)});
  require_like(y_grad, y, "y_grad");
  require_shape(y_grad, "y_grad", {y.shape(0), y.shape(1)});
  const void* from = grad.data();
  char *to_x = static_cast<char*>(x_grad.mutable_data()), *to_y = static_cast<char*>(y_grad.mutable_data());
  const py::gil_scoped_release release;
  const auto gradient = ADD_OPS_KERNEL(quantile_row_backward);
  for_rows(left, right, p, threads, true, [&](int64_t at, QuantileRow* row, double* sums) {
    const int size = row->wide ? 8 : 4;
    gradient(row, number_at(from, at, row->wide), sums, to_x + at * row->n * size, to_y + at * row->m * size);
  });
}

}  // namespace

void bind_quantile_distance(py::module_& m) {
  const char* sides =
      " x (rows, N) and y (rows, M) ascend; their orders are those of sort_with_index, weights (samples, N) or None.";
  m.def("quantile_distance", &forward, py::arg("x"), py::arg("y"), py::arg("x_order"), py::arg("y_order"),
        py::arg("x_weights"), py::arg("y_weights"), py::arg("p"), py::arg("out"), py::arg("threads"),
        (std::string("out[row] = W_p^p between weighted points on a line.") + sides).c_str());
  m.def("quantile_distance_backward", &backward, py::arg("grad"), py::arg("x"), py::arg("y"), py::arg("x_order"),
        py::arg("y_order"), py::arg("x_weights"), py::arg("y_weights"), py::arg("p"), py::arg("x_grad"),
        py::arg("y_grad"), py::arg("threads"),
        (std::string("Gradients of grad[row] · quantile_distance for x and y.") + sides).c_str());
}

}  // namespace add_ops
