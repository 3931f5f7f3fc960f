// The channel-averaged distance between the spectra of two feature maps, and its gradient, for a few channels of a sample.
//
// Channels are taken 2·lanes at a time. Channels i and lanes + i become the real and the imaginary part of lane i of a
// complex plane Z, which stays in the cache between its row and its column transforms. With P = (Z(k) + conj Z(-k))/2 and
// Q = (Z(k) - conj Z(-k))/2 the two channels' spectra are P and -iQ; |Z(k)|² + |Z(-k)|² = 2(|P|² + |Q|²), so l2 never
// separates them. Spectra are visited as pairs of columns v and -v, whose rows u and -u hold k and -k.
#include "spectral_distance.h"
#include "spectral_distance_fft.h"
#include "spectral_distance_simd.h"

namespace add_ops {
namespace ADD_OPS_ISA {

template <typename T>
struct Workspace {
  Complex<T>*plane, *other;  // other: the teacher's spectrum where it is needed by itself
  Complex<T>* scratch;
  Vec<T>* sums;  // forward only
};

template <typename T>
static size_t layout(const SpectralTask& task, void* memory, Workspace<T>* workspace) {
  const Plan<T>& plan = *static_cast<const Plan<T>*>(task.plan);
  const size_t slots = size_t(plan.height) * plan.pitch, longest = plan.height > plan.width ? plan.height : plan.width;
  auto* at = static_cast<Complex<T>*>(memory);
  const auto take = [&](size_t count) { return at += count, at - count; };
  Complex<T>* plane = take(slots);
  Complex<T>* other = task.distance == Distance::cosine ? take(slots) : nullptr;
  Complex<T>* scratch = take(longest);
  Complex<T>* sums = take((size_t(plan.width / 2 + 1) * plan.height + lanes<T> + 1) / 2);
  if (workspace) *workspace = {plane, other, scratch, reinterpret_cast<Vec<T>*>(sums)};
  return size_t(reinterpret_cast<char*>(at) - static_cast<char*>(memory));
}

// ---- between feature maps and planes ---------------------------------------------------------------------------------

// Channels [channel, channel + valid) of one sample, valid <= 2·lanes.
template <typename E>
struct View {
  E* data;
  int64_t c, h, w;
  View(const Features& f, int64_t sample, int64_t channel)
      : data(static_cast<E*>(f.data) + sample * f.stride[0] + channel * f.stride[1]),
        c(f.stride[1]), h(f.stride[2]), w(f.stride[3]) {}
  bool planar(int width) const { return w == 1 && h == width; }
};

// Pixels [begin, end) of the student, or of student - teacher, into the plane. `end - begin` is a number of whole rows.
template <typename T, typename E, bool difference>
static void load_pixels(const Plan<T>& plan, const View<E>& student, const View<E>& teacher, int valid, int begin, int end,
                        Complex<T>* plane) {
  constexpr int n = lanes<T>;
  const auto vector = [&](const E* s, const E* t) __attribute__((always_inline)) {
    return difference ? load_as<T>(s) - load_as<T>(t) : load_as<T>(s);
  };
  if (student.planar(plan.width) && (!difference || teacher.planar(plan.width)) && end - begin >= n) {
    const auto squares = [&](auto full) __attribute__((always_inline)) {
      for (int pixel = begin; pixel < end; pixel += n) {
        const int first = pixel < end - n ? pixel : end - n;  // the last square may overlap the one before
        const E *s = student.data + first, *t = teacher.data + first;
        for (int part = 0; part < 2; ++part) {
          Vec<T> square[n];
          ADD_OPS_UNROLL for (int i = 0; i < n; ++i, s += student.c, t += teacher.c)
            square[i] = full || part * n + i < valid ? vector(s, t) : Vec<T>{};
          transpose<T>(square);
          ADD_OPS_UNROLL for (int i = 0; i < n; ++i) (&plane[plan.slot_of_pixel[first + i]].re)[part] = square[i];
        }
      }
    };
    valid == 2 * n ? squares(std::true_type()) : squares(std::false_type());
    return;
  }
  const bool in_place = student.c == 1 && (!difference || teacher.c == 1) && valid == 2 * n;
  E s[2 * n] = {}, t[2 * n] = {};
  for (int pixel = begin, row = begin / plan.width; pixel < end; ++row) {
    for (int column = 0; column < plan.width; ++column, ++pixel) {
      const E *from = student.data + row * student.h + column * student.w, *minus = teacher.data + row * teacher.h + column * teacher.w;
      if (!in_place) {
        for (int c = 0; c < valid; ++c) s[c] = from[c * student.c];
        if (difference)
          for (int c = 0; c < valid; ++c) t[c] = minus[c * teacher.c];
        from = s, minus = t;
      }
      plane[plan.slot_of_pixel[pixel]] = {vector(from, minus), vector(from + n, minus + n)};
    }
  }
}

template <typename T, typename E>
static void store_pixels(const Plan<T>& plan, const Complex<T>* plane, int valid, int begin, int end, const View<E>& gradient,
                         bool streaming) {
  constexpr int n = lanes<T>;
  if (gradient.planar(plan.width) && end - begin >= n) {
    const auto square_at = [&](int first, int part, Vec<T>(&square)[n]) __attribute__((always_inline)) {
      ADD_OPS_UNROLL for (int i = 0; i < n; ++i) square[i] = (&plane[plan.slot_of_pixel[first + i]].re)[part];
      transpose<T>(square);
    };
    if constexpr (std::is_same_v<T, E>) {
      constexpr int line = 64 / sizeof(T);  // whole cache lines not 4 KiB apart, or streaming does harm
      const auto address = reinterpret_cast<uintptr_t>(gradient.data + begin);
      if (streaming && valid == 2 * n && address % 64 == 0 && gradient.c % line == 0 &&
          gradient.c * sizeof(T) % 4096 != 0 && (end - begin) % line == 0) {
        for (int pixel = begin; pixel < end; pixel += line) {
          for (int part = 0; part < 2; ++part) {
            Vec<T> squares[line / n][n];
            ADD_OPS_UNROLL for (int k = 0; k < line / n; ++k) square_at(pixel + k * n, part, squares[k]);
            ADD_OPS_UNROLL for (int i = 0; i < n; ++i)
              ADD_OPS_UNROLL for (int k = 0; k < line / n; ++k)
                stream(gradient.data + (part * n + i) * gradient.c + pixel + k * n, squares[k][i]);
          }
        }
        return;
      }
    }
    for (int pixel = begin; pixel < end; pixel += n) {
      const int first = pixel < end - n ? pixel : end - n;
      for (int part = 0; part < 2; ++part) {
        Vec<T> square[n];
        square_at(first, part, square);
        ADD_OPS_UNROLL for (int i = 0; i < n; ++i)
          if (part * n + i < valid) store_as<T>(gradient.data + (part * n + i) * gradient.c + first, square[i]);
      }
    }
    return;
  }
  const bool in_place = gradient.c == 1 && valid == 2 * n;
  E g[2 * n];
  for (int pixel = begin, row = begin / plan.width; pixel < end; ++row) {
    for (int column = 0; column < plan.width; ++column, ++pixel) {
      E* to = gradient.data + row * gradient.h + column * gradient.w;
      const Complex<T>& value = plane[plan.slot_of_pixel[pixel]];
      store_as<T>(in_place ? to : g, value.re);
      store_as<T>(in_place ? to + n : g + n, value.im);
      if (!in_place)
        for (int c = 0; c < valid; ++c) to[c * gradient.c] = g[c];
    }
  }
}

// ---- at a pair of frequencies k, -k ----------------------------------------------------------------------------------

template <typename T>
struct Pair {
  Complex<T> p, q;
};
template <typename T>
ADD_OPS_INLINE Pair<T> split(const Complex<T>& a, const Complex<T>& b) {
  return {{(a.re + b.re) * T(0.5), (a.im - b.im) * T(0.5)}, {(a.re - b.re) * T(0.5), (a.im + b.im) * T(0.5)}};
}
template <typename T>
ADD_OPS_INLINE void join(const Pair<T>& x, Complex<T>& a, Complex<T>& b) {
  a = x.p + x.q, b = {x.p.re - x.q.re, x.q.im - x.p.im};
}
template <typename T>
ADD_OPS_INLINE Vec<T> power(const Complex<T>& a) {
  return a.re * a.re + a.im * a.im;
}
template <typename T>
ADD_OPS_INLINE Vec<T> root(Vec<T> x) {
  for (int i = 0; i < lanes<T>; ++i) x[i] = sizeof(T) == 8 ? __builtin_sqrt(x[i]) : __builtin_sqrtf(x[i]);
  return x;
}

// For cosine: a coefficient at or below `floor`, the rounding noise of its plane, counts as zero.
template <typename T>
ADD_OPS_INLINE Vec<T> reciprocal_size(const Complex<T>& a, Vec<T> floor) {
  const Vec<T> size = root<T>(power(a));
  return size > floor ? T(1) / size : Vec<T>{};
}

template <typename T>
struct Constants {
  T exponent;           // gaussian
  Vec<T> floor, other;  // cosine: of the student's and of the teacher's plane
};

template <typename T, Distance distance>
ADD_OPS_INLINE Vec<T> value(const Complex<T>& a, const Complex<T>& b, const Complex<T>& other_a, const Complex<T>& other_b,
                            const Constants<T>& constants) {
  if constexpr (distance == Distance::l2) return power(a) + power(b);
  const Pair<T> s = split(a, b);
  if constexpr (distance == Distance::gaussian) {
    const auto x = exponential<T>(power(s.p) * -constants.exponent), y = exponential<T>(power(s.q) * -constants.exponent);
    return (T(1) - x.scale) - x.scale * x.m1 + ((T(1) - y.scale) - y.scale * y.m1);
  }
  const Pair<T> t = split(other_a, other_b);
  const auto similarity = [&](const Complex<T>& x, const Complex<T>& y) __attribute__((always_inline)) {
    return (x.re * y.re + x.im * y.im) * reciprocal_size(x, constants.floor) * reciprocal_size(y, constants.other);
  };
  return similarity(s.p, t.p) + similarity(s.q, t.q);
}

template <typename T, Distance distance>
ADD_OPS_INLINE void differentiate(Complex<T>& a, Complex<T>& b, const Complex<T>& other_a, const Complex<T>& other_b,
                                  T weight, const Constants<T>& constants) {
  if constexpr (distance == Distance::l2) {
    const Complex<T> x = {a.re * weight, a.im * weight}, y = {b.re * weight, b.im * weight};
    a = x, b = y;  // a and b may be the same
    return;
  }
  const Pair<T> s = split(a, b);
  if constexpr (distance == Distance::gaussian) {
    const auto scaled = [&](const Complex<T>& x) __attribute__((always_inline)) -> Complex<T> {
      const auto e = exponential<T>(power(x) * -constants.exponent);
      const Vec<T> factor = (e.scale + e.scale * e.m1) * weight;
      return {x.re * factor, x.im * factor};
    };
    join<T>({scaled(s.p), scaled(s.q)}, a, b);
    return;
  }
  const Pair<T> t = split(other_a, other_b);
  const auto turned = [&](const Complex<T>& x, const Complex<T>& y) __attribute__((always_inline)) -> Complex<T> {
    const Vec<T> x_size = reciprocal_size(x, constants.floor), y_size = reciprocal_size(y, constants.other);
    const Complex<T> u = {x.re * x_size, x.im * x_size}, v = {y.re * y_size, y.im * y_size};
    const Vec<T> across = (u.re * v.im - u.im * v.re) * x_size * weight;  // v - Re(u·conj v)·u = i·u·Im(v·conj u)
    return {-u.im * across, u.re * across};
  };
  join<T>({turned(s.p, t.p), turned(s.q, t.q)}, a, b);
}

// ---- the two directions ----------------------------------------------------------------------------------------------

template <typename T, typename E, Distance distance, bool backward>
struct Pass {
  const SpectralTask& task;
  const Plan<T>& plan;
  Workspace<T> workspace;
  const T* weights;
  int64_t sample;

  static constexpr bool difference = distance != Distance::cosine;

  int rows_at_once() const { return plan.small ? plan.height : lanes<T>; }

  template <bool inverse>
  void transform_rows(Complex<T>* plane, int begin, int end) {
    if (plan.small) return transform<inverse>(plan.rows, plane, 1, plan.height, plan.pitch, workspace.scratch);
    for (int h = begin; h < end; ++h)
      transform<inverse>(plan.rows, plane + plan.columns.slot_of_index[h] * plan.pitch, 1, 1, 0, workspace.scratch);
  }

  template <bool inverse>
  void transform_columns(Complex<T>* plane, int first, int second) {
    if (plan.small) return;
    transform<inverse>(plan.columns, plane + first, plan.pitch, 1, 0, workspace.scratch);
    if (second != first) transform<inverse>(plan.columns, plane + second, plan.pitch, 1, 0, workspace.scratch);
  }

  template <bool inverse>
  void transform_all_columns(Complex<T>* plane) {
    if (plan.small) transform<inverse>(plan.columns, plane, plan.pitch, plan.width, 1, workspace.scratch);
  }

  void load(Complex<T>* plane, const Features& from, int64_t channel, int valid) {
    const View<E> student(from, sample, channel), teacher(task.teacher, sample, channel);
    for (int h = 0; h < plan.height; h += rows_at_once()) {
      const int end = h + rows_at_once() < plan.height ? h + rows_at_once() : plan.height;
      load_pixels<T, E, difference>(plan, student, teacher, valid, h * plan.width, end * plan.width, plane);
      if (plan.small) prefetch(channel, 0, 3);
      transform_rows<false>(plane, h, end);
    }
    if (plan.small) prefetch(channel, 1, 3);
    transform_all_columns<false>(plane);
    if (plan.small) prefetch(channel, 2, 3);
  }

  void store(const Complex<T>* plane, int64_t channel, int valid) {
    const View<E> gradient(task.gradient, sample, channel);
    for (int h = 0; h < plan.height; h += rows_at_once()) {
      const int end = h + rows_at_once() < plan.height ? h + rows_at_once() : plan.height;
      transform_rows<true>(workspace.plane, h, end);
      store_pixels<T, E>(plan, plane, valid, h * plan.width, end * plan.width, gradient, task.stream);
    }
  }

  // What rounding can leave in a coefficient that should be zero: 4ε of the pixels' Euclidean norm, which is known from
  // the plane's state between or (where the plane is small) after the transforms.
  Vec<T> noise_floor(const Complex<T>* plane) const {
    Vec<T> energy = {};
    for (int i = 0; i < plan.height * plan.width; ++i) energy += power(plane[plan.slot_of_pixel[i]]);
    return root<T>(energy / T(plan.small ? plan.height * plan.width : plan.width)) * T(0x1p-50);
  }

  // Asks for the given part of the next channels of planar features while the present ones are transformed.
  void prefetch(int64_t channel, int part, int parts) const {
    const int64_t length = (int64_t(2) * lanes<T> * sizeof(E) * plan.height * plan.width + parts - 1) / parts;
    for (const Features* features : {&task.student, &task.teacher}) {
      const View<E> next(*features, sample, channel + 2 * lanes<T>);
      if (!next.planar(plan.width)) continue;
      const char* start = reinterpret_cast<const char*>(next.data) + length * part;
      for (int64_t at = 0; at < length; at += 64) __builtin_prefetch(start + at, 0, 2);
    }
  }

  void visit_columns(int64_t channel) {
    Complex<T>*plane = workspace.plane, *other = workspace.other;
    Constants<T> constants{T(task.exponent), {}, {}};
    if (!difference) constants.floor = noise_floor(plane), constants.other = noise_floor(other);
    for (int v = 0; v <= plan.width / 2; ++v) {
      const int mirror = v ? plan.width - v : 0;
      const int first = plan.rows.slot_of_frequency[v], second = plan.rows.slot_of_frequency[mirror];
      if (!plan.small) prefetch(channel, v, plan.width / 2 + 1);
      transform_columns<false>(plane, first, second);
      if (!difference) transform_columns<false>(other, first, second);
      const int last = mirror == v ? plan.height / 2 : plan.height - 1;
      const auto* weight = backward ? weights + int64_t(v) * plan.height : nullptr;
      Vec<T>* sum = backward ? nullptr : workspace.sums + int64_t(v) * plan.height;
      for (int u = 0; u <= last; ++u) {
        const int64_t i = plan.row_of_frequency[u] + first, j = plan.row_of_frequency[u ? plan.height - u : 0] + second;
        const Complex<T>&other_a = difference ? plane[i] : other[i], &other_b = difference ? plane[j] : other[j];
        if constexpr (backward)
          differentiate<T, distance>(plane[i], plane[j], other_a, other_b, weight[u], constants);
        else
          sum[u] += value<T, distance>(plane[i], plane[j], other_a, other_b, constants);
      }
      if (backward) transform_columns<true>(plane, first, second);
    }
    if (backward) transform_all_columns<true>(plane);
  }

  void run(int64_t first, int64_t count) {
    for (int64_t channel = first; channel < first + count; channel += 2 * lanes<T>) {
      const int64_t left = first + count - channel;
      const int valid = left < 2 * lanes<T> ? int(left) : 2 * lanes<T>;
      load(workspace.plane, task.student, channel, valid);
      if (!difference) load(workspace.other, task.teacher, channel, valid);
      visit_columns(channel);
      if constexpr (backward) store(workspace.plane, channel, valid);
    }
    if (backward && task.stream) fence_streams();
  }
};

template <typename T, typename E, Distance distance>
static void run(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, double* sums, const void* weights,
                void* memory) {
  const Plan<T>& plan = *static_cast<const Plan<T>*>(task.plan);
  Workspace<T> workspace;
  layout<T>(task, memory, &workspace);
  if (weights) {
    Pass<T, E, distance, true>{task, plan, workspace, static_cast<const T*>(weights), sample}.run(first, count);
    return;
  }
  constexpr int n = lanes<T>;
  const int64_t entries = int64_t(plan.width / 2 + 1) * plan.height;
  for (int64_t i = 0; i < entries + n; ++i) workspace.sums[i] = Vec<T>{};
  Pass<T, E, distance, false>{task, plan, workspace, nullptr, sample}.run(first, count);
  for (int64_t i = 0; i < entries; i += n) {
    Vec<T> square[n];
    ADD_OPS_UNROLL for (int k = 0; k < n; ++k) square[k] = workspace.sums[i + k];
    transpose<T>(square);
    Vector<double, n> total = {};
    ADD_OPS_UNROLL for (int k = 0; k < n; ++k) total += __builtin_convertvector(square[k], Vector<double, n>);
    std::memcpy(sums + i, &total, sizeof(double) * size_t(entries - i < n ? entries - i : n));
  }
}

// Cosine divides by coefficients that may be as small as rounding noise, so it is computed in float64 throughout.
static void run_any(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, double* sums, const void* weights,
                    void* memory) {
  const auto call = [&](auto compute, auto element) {
    using T = decltype(compute);
    using E = decltype(element);
    if constexpr (sizeof(T) == 8)
      if (task.distance == Distance::cosine) return run<T, E, Distance::cosine>(task, sample, first, count, sums, weights, memory);
    if constexpr (sizeof(T) == 4 || sizeof(E) == 8) {
      if (task.distance == Distance::l2) return run<T, E, Distance::l2>(task, sample, first, count, sums, weights, memory);
      return run<T, E, Distance::gaussian>(task, sample, first, count, sums, weights, memory);
    }
  };
  const auto widen = [&](auto element) { return task.wide ? call(double(), element) : call(float(), element); };
  switch (task.element) {
    case Element::float32: return widen(float());
    case Element::float16: return widen(Half());
    case Element::bfloat16: return widen(Bfloat());
    case Element::float64: return call(double(), double());
  }
}

size_t spectral_workspace(const SpectralTask& task) {
  return task.wide ? layout<double>(task, nullptr, nullptr) : layout<float>(task, nullptr, nullptr);
}

void spectral_forward(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, double* sums, void* workspace) {
  run_any(task, sample, first, count, sums, nullptr, workspace);
}

void spectral_backward(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, const void* weights,
                       void* workspace) {
  run_any(task, sample, first, count, nullptr, weights, workspace);
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
