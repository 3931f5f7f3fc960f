// spectral_distance: the mean over channels of a distance between the DFTs of two feature maps, and its gradient.
#include "spectral_distance.h"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "arrays.h"
#include "parallel.h"
#include "spectral_distance_plan.h"

namespace add_ops {
namespace {

struct Shape {
  int64_t batch, channels;
  int height, width;
  int64_t half() const { return int64_t(width / 2 + 1) * height; }
  int64_t pixels() const { return int64_t(height) * width; }
  // Channels that one thread sums before it writes float64 partial sums: a matter of the shape, not of the threads.
  int64_t chunk() const { return std::min<int64_t>(512, std::max<int64_t>(32, batch * channels / 1024 * 32)); }
  int64_t chunks() const { return (channels + chunk() - 1) / chunk(); }
  int64_t chunk_size(int64_t i) const { return std::min(chunk(), channels - i * chunk()); }

  // Entry of the half spectrum (v-major, 0 <= v <= width/2) that holds frequency (u, v) or its mirror image.
  int64_t entry(int u, int v) const {
    const int mirror_u = u ? height - u : 0, mirror_v = v ? width - v : 0;
    const bool mirrored = v > mirror_v || (v == mirror_v && u > mirror_u);
    return mirrored ? int64_t(mirror_v) * height + mirror_u : int64_t(v) * height + u;
  }
};

class Workspaces {
 public:
  Workspaces(size_t bytes, int count)
      : bytes_((bytes + 63) / 64 * 64), memory_(std::aligned_alloc(64, bytes_ * count), std::free) {
    if (!memory_) throw std::bad_alloc();
  }
  void* operator[](int worker) const { return static_cast<char*>(memory_.get()) + bytes_ * worker; }

 private:
  size_t bytes_;
  std::unique_ptr<void, decltype(&std::free)> memory_;
};

// Returns whether the map holds finite numbers alone.
template <typename T>  // of the map
bool forward(const SpectralTask& task, const Shape& shape, double scale, T* out, int threads) {
  const auto kernel = ADD_OPS_KERNEL(spectral_forward);
  const Workspaces workspaces(ADD_OPS_KERNEL(spectral_workspace)(task), threads);
  const int64_t chunks = shape.chunks(), half = shape.half();
  std::vector<double> sums(static_cast<size_t>(shape.batch * chunks * half));
  parallel_for(shape.batch * chunks, threads, [&](int64_t item, int worker) {
    const int64_t chunk = item % chunks;
    kernel(task, item / chunks, chunk * shape.chunk(), shape.chunk_size(chunk), &sums[item * half], workspaces[worker]);
  });
  const double factor = (task.distance == Distance::l2 ? scale * scale / 2 : 1.0) / static_cast<double>(shape.channels);
  std::atomic<bool> finite{true};
  parallel_for(shape.batch, threads, [&](int64_t sample, int) {
    double* total = &sums[sample * chunks * half];
    for (int64_t i = 0; i < half; ++i) {
      for (int64_t chunk = 1; chunk < chunks; ++chunk) total[i] += total[chunk * half + i];
      total[i] = task.distance == Distance::cosine ? 1 - total[i] * factor : total[i] * factor;
      if (!(std::fabs(total[i]) <= static_cast<double>(std::numeric_limits<T>::max()))) finite = false;
    }
    T* map = out + sample * shape.pixels();
    for (int u = 0; u < shape.height; ++u)
      for (int v = 0; v < shape.width; ++v) *map++ = static_cast<T>(total[shape.entry(u, v)]);
  });
  return finite;
}

template <typename G, typename T>  // of the upstream gradient, and of the computation
void backward(const SpectralTask& task, const Shape& shape, double factor, const G* grad, int threads) {
  const auto kernel = ADD_OPS_KERNEL(spectral_backward);
  const Workspaces workspaces(ADD_OPS_KERNEL(spectral_workspace)(task), threads);
  const int64_t chunks = shape.chunks(), half = shape.half();
  std::vector<T> weights(static_cast<size_t>(shape.batch * half));
  for (int64_t sample = 0; sample < shape.batch; ++sample) {
    const G* g = grad + sample * shape.pixels();
    T* weight = &weights[sample * half];
    for (int v = 0; v <= shape.width / 2; ++v) {
      for (int u = 0; u < shape.height; ++u) {
        const int mirror_u = u ? shape.height - u : 0, mirror_v = v ? shape.width - v : 0;
        const double both = double(g[u * shape.width + v]) + double(g[mirror_u * shape.width + mirror_v]);
        *weight++ = static_cast<T>(both / 2 * factor);
      }
    }
  }
  parallel_for(shape.batch * chunks, threads, [&](int64_t item, int worker) {
    const int64_t sample = item / chunks, chunk = item % chunks;
    kernel(task, sample, chunk * shape.chunk(), shape.chunk_size(chunk), &weights[sample * half], workspaces[worker]);
  });
}

Features features_of(const py::array& array, const char* name) {
  require_aligned(array, name);
  Features features{const_cast<void*>(array.data()), {}};
  for (int i = 0; i < 4; ++i) features.stride[i] = array.strides(i) / array.itemsize();
  return features;
}

struct Call {
  Shape shape;
  SpectralTask task;
  double scale, sigma;
};

Call prepare(const py::array& student, const py::array& teacher, int distance, double sigma, double scale,
             int threads) {
  require_dtype(student, "student", {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16},
                "float32, float64, float16 or bfloat16 (as uint16)");
  require_shape(student, "student", {-1, -1, -1, -1});
  require_dtype(teacher, "teacher", {dtype_of(student)}, "the dtype of student");
  require_shape(teacher, "teacher", {student.shape(0), student.shape(1), student.shape(2), student.shape(3)});
  if (distance < 0 || distance > 2)
    throw py::value_error("distance: expected 0 (l2), 1 (cosine) or 2 (gaussian), got " + std::to_string(distance));
  if (!(sigma > 0)) throw py::value_error("sigma: expected a positive number, got " + std::to_string(sigma));
  if (threads < 1) throw py::value_error("threads: expected at least 1, got " + std::to_string(threads));
  constexpr int64_t most = int64_t(1) << 24;
  if (student.shape(2) > most || student.shape(3) > most || student.shape(2) * student.shape(3) > most)
    throw py::value_error("student: expected height times width of at most 2**24");
  Call call{};
  call.shape = {student.shape(0), student.shape(1), static_cast<int>(student.shape(2)),
                static_cast<int>(student.shape(3))};
  SpectralTask& task = call.task;
  task.distance = static_cast<Distance>(distance);
  switch (dtype_of(student)) {
    case Dtype::float64: task.element = Element::float64; break;
    case Dtype::float16: task.element = Element::float16; break;
    case Dtype::bfloat16: task.element = Element::bfloat16; break;
    default: task.element = Element::float32;
  }
  task.wide = task.element == Element::float64 || task.distance == Distance::cosine;
  task.student = features_of(student, "student"), task.teacher = features_of(teacher, "teacher");
  task.exponent = scale * scale / (2 * sigma * sigma);
  call.scale = scale, call.sigma = sigma;
  return call;
}

// Runs `work` with the plan in task.plan, without the interpreter's lock.
template <typename Work>
void with_plan(SpectralTask& task, const Shape& shape, const Work& work) {
  py::gil_scoped_release release;
  const auto run = [&](auto zero) {
    const PlanBuilder<decltype(zero)> builder(shape.height, shape.width);
    task.plan = &builder.plan;
    work(zero);
  };
  task.wide ? run(double()) : run(float());
}

void require_map(const py::array& map, const char* name, const Call& call) {
  const Shape& s = call.shape;
  const bool wide = call.task.element == Element::float64;
  if (wide)
    require_dtype(map, name, {Dtype::float64}, "float64, as student");
  else
    require_dtype(map, name, {Dtype::float32, Dtype::float64}, "float32 or float64");
  require_shape(map, name, {s.batch, s.height, s.width});
  require_contiguous(map, name);
}

bool spectral_distance(const py::array& student, const py::array& teacher, int distance, double sigma, double scale,
                       py::array& out, int threads) {
  Call call = prepare(student, teacher, distance, sigma, scale, threads);
  require_map(out, "out", call);
  require_writeable(out, "out");
  void* const map = out.mutable_data();
  const bool wide_map = dtype_of(out) == Dtype::float64;
  if (out.size() == 0) return true;
  if (call.shape.channels == 0) {
    std::fill_n(static_cast<char*>(map), out.nbytes(), 0);
    return true;
  }
  bool finite = true;
  with_plan(call.task, call.shape, [&](auto) {
    finite = wide_map ? forward(call.task, call.shape, scale, static_cast<double*>(map), threads)
                      : forward(call.task, call.shape, scale, static_cast<float*>(map), threads);
  });
  return finite;
}

void spectral_distance_backward(const py::array& grad, const py::array& student, const py::array& teacher, int distance,
                                double sigma, double scale, py::array& out, int threads) {
  Call call = prepare(student, teacher, distance, sigma, scale, threads);
  require_map(grad, "grad", call);
  require_dtype(out, "out", {dtype_of(student)}, "the dtype of student");
  require_shape(out, "out", {student.shape(0), student.shape(1), student.shape(2), student.shape(3)});
  require_writeable(out, "out");
  if (out.size() == 0) return;
  call.task.gradient = features_of(out, "out");
  call.task.stream = out.nbytes() >= 16 << 20;
  const double squared = scale * scale;
  const double factor = (call.task.distance == Distance::l2       ? 2 * squared
                         : call.task.distance == Distance::cosine ? -1.0
                                                                  : squared / (sigma * sigma)) /
                        static_cast<double>(call.shape.channels);
  const void* const upstream = grad.data();
  const bool wide_map = dtype_of(grad) == Dtype::float64;
  with_plan(call.task, call.shape, [&](auto zero) {
    using T = decltype(zero);
    if (wide_map)
      backward<double, T>(call.task, call.shape, factor, static_cast<const double*>(upstream), threads);
    else
      backward<float, T>(call.task, call.shape, factor, static_cast<const float*>(upstream), threads);
  });
}

}  // namespace

void bind_spectral_distance(py::module_& m) {
  m.def(
      "spectral_distance", &spectral_distance, py::arg("student"), py::arg("teacher"), py::arg("distance"),
      py::arg("sigma"), py::arg("scale"), py::arg("out"), py::arg("threads"),
      "Writes into out (B, H, W) the channel mean of the distance (0 l2, 1 cosine, 2 gaussian) between scale·DFT of\n"
      "student and of teacher, both (B, C, H, W) with any strides. float32, float64, float16, or bfloat16 as uint16;\n"
      "out is float32 or float64, and float64 for float64. Returns whether all of out is finite: sums are in the\n"
      "dtype of the features, unscaled.");
  m.def("spectral_distance_backward", &spectral_distance_backward, py::arg("grad"), py::arg("student"),
        py::arg("teacher"), py::arg("distance"), py::arg("sigma"), py::arg("scale"), py::arg("out"), py::arg("threads"),
        "Writes into out the gradient with respect to student of the map that spectral_distance returns, for the\n"
        "upstream gradient grad (B, H, W), of a dtype that out might have there. By symmetry, exchanging student and\n"
        "teacher gives the teacher's.");
}

}  // namespace add_ops
