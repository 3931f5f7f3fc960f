// view_histogram: shares the work among threads and binds to Python.
#include "view_histogram.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "arrays.h"
#include "scratch.h"
#include "view_histogram_plan.h"

namespace add_ops {
namespace {

static_assert(sizeof(Line) == kRowBytes, "a row is a line of scratch memory");

// The power of two that brings the largest |x| of a sample near 1, as far as the dtype of its sums has it.
double sample_scale(const Problem& p, int64_t sample) {
  double largest = 0;
  const Array& x = p.features;
  for (int64_t c = 0; c < p.length[0]; ++c)
    for (int64_t h = 0; h < p.length[1]; ++h)
      for (int64_t w = 0; w < p.length[2]; ++w) {
        const int64_t at = sample * x.batch_stride + c * x.stride[0] + h * x.stride[1] + w * x.stride[2];
        float value;
        if (p.wide()) {
          largest = std::max(largest, std::fabs(static_cast<const double*>(x.data)[at]));
          continue;
        }
        if (p.type == Feature::float32) {
          value = static_cast<const float*>(x.data)[at];
        } else {
          const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(x.data)[at]) << 16;
          std::memcpy(&value, &bits, sizeof value);
        }
        largest = std::max<double>(largest, std::fabs(value));
      }
  if (largest == 0 || !std::isfinite(largest)) return 1;
  return std::ldexp(1.0, std::min(-std::ilogb(largest), p.wide() ? 1023 : 127));
}

void forward(const Problem& p, const double* directions, int64_t views, int64_t bins, bool unit, char* out,
             double* energy, int threads) {
  const Plan plan(p, directions, views, bins, unit, true, threads);
  const std::vector<Part> parts = make_parts(p, plan);
  const int64_t groups = p.groups(), count = static_cast<int64_t>(parts.size());
  std::vector<int64_t> first_row(groups * count + 1, 0);
  for (int64_t i = 0; i < groups * count; ++i) first_row[i + 1] = first_row[i] + parts[i % count].rows;
  const Scratch scratch(new Line[first_row.back()]);
  const auto rows = [&](int64_t item) { return scratch[first_row[item]].bytes; };

  const auto sum_boxes = ADD_OPS_KERNEL(histogram_boxes);
  const auto total = ADD_OPS_KERNEL(histogram_total);
  const auto finish = ADD_OPS_KERNEL(histogram_finish);
  std::vector<double> scale(groups * kLanes, 1.0), mass(groups * kLanes), partial(groups * count * kLanes);
  const auto sum_group = [&](int64_t from, int64_t to) {
    parallel_for((to - from) * count, threads, [&](int64_t i, int) {
      const int64_t item = from * count + i, group = item / count;
      const Part& part = parts[item % count];
      std::memset(rows(item), 0, static_cast<size_t>(part.rows) * kRowBytes);
      sum_boxes(plan.grid, p.type, plan.features, {group * p.lanes(), p.batch, part.begin, part.end},
                &scale[group * kLanes], rows(item), part.offset.data());
      total(p.wide(), part.reachable[0].second - part.reachable[0].first, rows(item), &partial[item * kLanes]);
    });
    std::fill(&mass[from * kLanes], &mass[0] + to * kLanes, 0.0);
    for (int64_t item = from * count; item < to * count; ++item)
      for (int lane = 0; lane < p.lanes(); ++lane) mass[item / count * kLanes + lane] += partial[item * kLanes + lane];
  };
  sum_group(0, groups);

  // Squares may leave the range of their dtype: then once more, scaled. Float16 squares never do.
  const double most = p.wide() ? 0x1p1000 : 0x1p120,
               least = (p.wide() ? 0x1p-900 : 0x1p-80) * static_cast<double>(p.positions());
  for (int64_t group = 0; group < groups && p.type != Feature::float16; ++group) {
    bool again = false;
    for (int lane = 0; lane < p.lanes() && group * p.lanes() + lane < p.batch; ++lane) {
      const double sum = mass[group * kLanes + lane];
      if (sum <= most && sum >= least) continue;
      scale[group * kLanes + lane] = sample_scale(p, group * p.lanes() + lane);
      again |= scale[group * kLanes + lane] != 1;
    }
    if (again) sum_group(group, group + 1);
  }

  std::vector<double> factor(groups * kLanes, 0.0);
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    const int64_t at = sample / p.lanes() * kLanes + sample % p.lanes();
    factor[at] = mass[at] == 0 ? 0 : std::isfinite(mass[at]) ? 1 / mass[at] : std::numeric_limits<double>::quiet_NaN();
    energy[sample] = mass[at] / scale[at] / scale[at];
  }
  std::vector<const void*> source(groups * views * count);
  std::vector<int64_t> range(views * count * 2);
  for (int64_t k = 0; k < views; ++k)
    for (int64_t c = 0; c < count; ++c) {
      range[(k * count + c) * 2] = parts[c].reachable[k].first;
      range[(k * count + c) * 2 + 1] = parts[c].reachable[k].second;
      for (int64_t g = 0; g < groups; ++g)
        source[(g * views + k) * count + c] =
            rows(g * count + c) + (parts[c].offset[k] + parts[c].reachable[k].first) * kRowBytes;
    }
  const int64_t item_size = p.wide() ? 8 : 4;
  parallel_for(groups * views, threads, [&](int64_t item, int) {
    const int64_t group = item / views, k = item % views, first = group * p.lanes();
    finish(p.wide(), bins, static_cast<int>(count), &source[item * count],
           reinterpret_cast<const int64_t (*)[2]>(&range[k * count * 2]), &factor[group * kLanes],
           static_cast<int>(std::min<int64_t>(p.lanes(), p.batch - first)),
           out + (first * views + k) * bins * item_size, views * bins);
  });
}

void backward(const Problem& p, const char* grad, const char* attention, const double* energy, const double* directions,
              int64_t views, int64_t bins, bool unit, int threads) {
  const Plan plan(p, directions, views, bins, unit, false, threads);
  const int64_t groups = p.groups(), item_size = p.wide() ? 8 : 4;
  std::vector<double> factor(groups * kLanes * 2, 0.0);  // 2 / energy as a power of two times the rest: both in range
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    if (energy[sample] == 0) continue;
    const double value = 2 / energy[sample];
    double* pair = &factor[(sample / p.lanes() * kLanes + sample % p.lanes()) * 2];
    pair[0] = std::ldexp(1.0, std::isfinite(value) && value != 0 ? std::clamp(std::ilogb(value) / 2, -126, 127) : 0);
    pair[1] = p.wide() ? value / pair[0] : std::min<double>(value / pair[0], FLT_MAX);
  }
  const Scratch rows(new Line[groups * views * bins]);
  const auto centre = ADD_OPS_KERNEL(histogram_centre);
  const auto gradient = ADD_OPS_KERNEL(histogram_gradient);
  parallel_for(groups * views, threads, [&](int64_t item, int) {
    const int64_t first = item / views * p.lanes(), at = (first * views + item % views) * bins * item_size;
    centre(p.wide(), bins, grad + at, attention + at, views * bins,
           static_cast<int>(std::min<int64_t>(p.lanes(), p.batch - first)), rows[item * bins].bytes);
  });
  const int64_t count = std::min(plan.boxes(), ceil_divide(4 * kItems, groups));
  std::vector<BoxStart> start(std::max(threads, 1) * views);
  parallel_for(groups * count, threads, [&](int64_t item, int worker) {
    const int64_t group = item / count, c = item % count;
    gradient(plan.grid, p.type, plan.features, plan.out,
             {group * p.lanes(), p.batch, plan.boxes() * c / count, plan.boxes() * (c + 1) / count},
             reinterpret_cast<const double (*)[2]>(&factor[group * kLanes * 2]), rows[group * views * bins].bytes,
             &start[worker * views]);
  });
}

// What integers of 64 bits hold: no sum of the steps of a view, times the bins, leaves them.
constexpr double kLargestView = 1e280, kMostPositions = 0x1p40;

Array strided(const py::array& array, const char* name) {
  require_aligned(array, name);
  Array result{const_cast<void*>(array.data()), 0, {}};
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) strides[i] = array.strides(i) / array.itemsize();
  result.batch_stride = strides[0];
  std::copy(strides + 1, strides + 4, result.stride);
  return result;
}

Problem read_problem(const py::array& features, const py::array& views, int64_t bins) {
  require_dtype(features, "features", {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16},
                "float32, float64, float16 or bfloat16 (as uint16)");
  require_shape(features, "features", {-1, -1, -1, -1});
  require_dtype(views, "views", {Dtype::float64}, "float64");
  require_shape(views, "views", {-1, 3});
  require_contiguous(views, "views");
  if (views.shape(0) < 1) throw py::value_error("views: expected at least one view, got none");
  for (py::ssize_t i = 0; i < views.size(); ++i)
    if (!(std::fabs(static_cast<const double*>(views.data())[i]) <= kLargestView))
      throw py::value_error("views: expected finite numbers of at most 1e280");
  if (bins < 1 || bins > 1 << 20) throw py::value_error("bins: expected 1 to 1048576, got " + std::to_string(bins));
  const Dtype dtype = dtype_of(features);
  Problem p;
  p.type = dtype == Dtype::float32   ? Feature::float32
           : dtype == Dtype::float64 ? Feature::float64
           : dtype == Dtype::float16 ? Feature::float16
                                     : Feature::bfloat16;
  p.features = p.out = strided(features, "features");
  p.batch = features.shape(0);
  double positions = 1;
  for (int i = 0; i < 3; ++i) positions *= static_cast<double>(p.length[i] = features.shape(i + 1));
  if (positions > kMostPositions) throw py::value_error("features: expected at most 2**40 positions in a sample");
  return p;
}

void require_histogram(const Problem& p, const py::array& array, const char* name, int64_t views, int64_t bins) {
  if (p.wide())
    require_dtype(array, name, {Dtype::float64}, "float64, as the features");
  else
    require_dtype(array, name, {Dtype::float32}, "float32");
  require_shape(array, name, {p.batch, views, bins});
  require_contiguous(array, name);
}

void require_energy(const Problem& p, const py::array& array) {
  require_dtype(array, "energy", {Dtype::float64}, "float64");
  require_shape(array, "energy", {p.batch});
  require_contiguous(array, "energy");
}

void view_histogram(const py::array& features, const py::array& views, int64_t bins, bool unit, py::array out,
                    py::array energy, int threads) {
  const Problem p = read_problem(features, views, bins);
  require_histogram(p, out, "out", views.shape(0), bins);
  require_energy(p, energy);
  char* target = static_cast<char*>(out.mutable_data());
  double* total = static_cast<double*>(energy.mutable_data());
  const double* directions = static_cast<const double*>(views.data());
  const int64_t count = views.shape(0);
  const py::gil_scoped_release release;
  if (p.batch == 0) return;
  if (p.positions() > 0) return forward(p, directions, count, bins, unit, target, total, threads);
  std::memset(target, 0, static_cast<size_t>(p.batch * count * bins * (p.wide() ? 8 : 4)));
  std::fill(total, total + p.batch, 0.0);
}

void view_histogram_backward(const py::array& grad, const py::array& features, const py::array& views,
                             const py::array& attention, const py::array& energy, bool unit, py::array out,
                             int threads) {
  require_shape(grad, "grad", {-1, -1, -1});
  const int64_t bins = grad.shape(2), count = views.ndim() > 0 ? views.shape(0) : 0;
  Problem p = read_problem(features, views, bins);
  require_histogram(p, grad, "grad", count, bins);
  require_histogram(p, attention, "attention", count, bins);
  require_energy(p, energy);
  require_same_dtype(out, "out", features, "the features");
  require_shape(out, "out", {p.batch, p.length[0], p.length[1], p.length[2]});
  require_writeable(out, "out");
  p.out = strided(out, "out");
  const char *g = static_cast<const char*>(grad.data()), *a = static_cast<const char*>(attention.data());
  const double *e = static_cast<const double*>(energy.data()), *directions = static_cast<const double*>(views.data());
  const py::gil_scoped_release release;
  if (p.batch > 0 && p.positions() > 0) backward(p, g, a, e, directions, count, bins, unit, threads);
}

}  // namespace

void bind_view_histogram(py::module_& m) {
  m.def("view_histogram", &view_histogram, py::arg("features"), py::arg("views"), py::arg("bins"), py::arg("unit"),
        py::arg("out"), py::arg("energy"), py::arg("threads"),
        "out (B, K, M) = mass of features (B, C, H, W) per bin along views (K, 3); energy (B,) = sum of squares.");
  m.def("view_histogram_backward", &view_histogram_backward, py::arg("grad"), py::arg("features"), py::arg("views"),
        py::arg("attention"), py::arg("energy"), py::arg("unit"), py::arg("out"), py::arg("threads"),
        "out (B, C, H, W) = gradient of the features for grad (B, K, M), given the forward's attention and energy.");
}

}  // namespace add_ops
