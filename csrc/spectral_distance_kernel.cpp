// The distance between the spectra of two feature maps, and its gradient, summed over a few channels of a sample.
//
// Channels are taken 2·lanes at a time. Channels i and lanes + i become the real and the imaginary part of lane i of a
// complex plane Z, which stays in the cache between its row and its column transforms. With P = (Z(k) + conj Z(-k))/2
// and Q = (Z(k) - conj Z(-k))/2 the two channels' spectra are P and -iQ; |Z(k)|² + |Z(-k)|² = 2(|P|² + |Q|²), so l2
// never separates them. Spectra are visited as pairs of columns v and -v, whose rows u and -u hold k and -k.
#include "spectral_distance.h"

#include "spectral_distance_fft.h"
#include "spectral_distance_planes.h"

namespace add_ops {
namespace ADD_OPS_ISA {

template <typename T>
struct Workspace {
  Complex<T>*plane, *other;  // other: the teacher's spectrum where it is needed by itself
  Complex<T>* scratch;
  T *staged, *other_staged;
  Vec<T>* sums;  // forward only
};

template <typename T>
static size_t layout(const SpectralTask& task, void* memory, Workspace<T>* workspace) {
  const Plan<T>& plan = *static_cast<const Plan<T>*>(task.plan);
  const size_t slots = size_t(plan.height) * plan.pitch, longest = plan.height > plan.width ? plan.height : plan.width;
  const bool separate = task.distance == Distance::cosine;
  auto* at = static_cast<Complex<T>*>(memory);
  const auto take = [&](size_t count) { return at += count, at - count; };
  Workspace<T> taken;
  taken.plane = take(slots);
  taken.other = separate ? take(slots) : nullptr;
  taken.scratch = take(longest);
  taken.staged = reinterpret_cast<T*>(take(size_t(plan.staged_groups) * plan.staged_pitch));
  taken.other_staged = separate ? reinterpret_cast<T*>(take(size_t(plan.staged_groups) * plan.staged_pitch)) : nullptr;
  taken.sums = reinterpret_cast<Vec<T>*>(take((size_t(plan.width / 2 + 1) * plan.height + lanes<T> + 1) / 2));
  if (workspace) *workspace = taken;
  return size_t(reinterpret_cast<char*>(at) - static_cast<char*>(memory));
}

// ---- at a pair of frequencies k, -k ---------------------------------------------------------------------------------

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

// For cosine: a coefficient at or below `floor`, the rounding noise of its plane, counts as zero; NaN stays NaN.
template <typename T>
ADD_OPS_INLINE Vec<T> reciprocal_size(const Complex<T>& a, Vec<T> floor) {
  const Vec<T> size = root<T>(power(a));
  return size <= floor ? Vec<T>{} : T(1) / size;
}

template <typename T>
struct Constants {
  T exponent;           // gaussian
  Vec<T> floor, other;  // cosine: of the student's and of the teacher's plane
};

template <typename T, Distance distance>
ADD_OPS_INLINE Vec<T> value(const Complex<T>& a, const Complex<T>& b, const Complex<T>& other_a,
                            const Complex<T>& other_b, const Constants<T>& constants) {
  if constexpr (distance == Distance::l2) return power(a) + power(b);
  const Pair<T> s = split(a, b);
  if constexpr (distance == Distance::gaussian) {
    const auto x = exponential<T>(power(s.p) * -constants.exponent),
               y = exponential<T>(power(s.q) * -constants.exponent);
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

// ---- the two directions ---------------------------------------------------------------------------------------------

template <typename T, typename E, Distance distance, bool backward>
struct Pass {
  const SpectralTask& task;
  const Plan<T>& plan;
  Workspace<T> workspace;
  const T* weights;
  int64_t sample;

  static constexpr bool difference = distance != Distance::cosine;

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

  // Calls body(first, last) for each block of rows that is moved and transformed together.
  template <typename Body>
  void for_each_block(const Body& body) const {
    const int rows = plan.small ? plan.height : lanes<T>;
    for (int first = 0; first < plan.height; first += rows)
      body(first, first + rows < plan.height ? first + rows : plan.height);
  }

  void load(Complex<T>* plane, const Features& from, int64_t channel, int valid, T* staged) {
    const View<E> student(from, sample, channel), teacher(task.teacher, sample, channel);
    const View<T> copy(staged, plan.staged_pitch, plan.width);
    for_each_block([&](int first, int last) {
      const int begin = first * plan.width, end = last * plan.width;
      if (!staged)
        load_pixels<T, E, difference>(plan, student, teacher, valid, begin, end, plane);
      else if (end - begin < lanes<T>)
        load_pixels<T, T, false>(plan, copy, copy, 2 * lanes<T>, begin, end, plane);
      else
        load_squares(plan, staged, begin, end, plane);
      transform_rows<false>(plane, first, last);
    });
    transform_all_columns<false>(plane);
  }

  void store(Complex<T>* plane, int64_t channel, int valid, T* staged) {
    const View<T> copy(staged, plan.staged_pitch, plan.width);
    for_each_block([&](int first, int last) {
      const int begin = first * plan.width, end = last * plan.width;
      transform_rows<true>(plane, first, last);
      if (!staged)
        store_pixels<T, E>(plan, plane, valid, begin, end, View<E>(task.gradient, sample, channel));
      else if (end - begin < lanes<T>)
        store_pixels<T, T>(plan, plane, 2 * lanes<T>, begin, end, copy);
      else
        store_squares(plan, plane, begin, end, staged);
    });
  }

  // What rounding can leave in a coefficient that should be zero: 4ε of the pixels' Euclidean norm, which is known from
  // the plane's state between or (where the plane is small) after the transforms.
  Vec<T> noise_floor(const Complex<T>* plane) const {
    Vec<T> energy = {};
    for (int i = 0; i < plan.height * plan.width; ++i) energy += power(plane[plan.slot_of_pixel[i]]);
    return root<T>(energy / T(plan.small ? plan.height * plan.width : plan.width)) * T(0x1p-50);
  }

  void visit_columns() {
    Complex<T>*plane = workspace.plane, *other = workspace.other;
    Constants<T> constants{T(task.exponent), {}, {}};
    if (!difference) constants.floor = noise_floor(plane), constants.other = noise_floor(other);
    for (int v = 0; v <= plan.width / 2; ++v) {
      const int mirror = v ? plan.width - v : 0;
      const int first = plan.rows.slot_of_frequency[v], second = plan.rows.slot_of_frequency[mirror];
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

  // True if `staged` now holds the channels, false if they are to be read in place.
  bool stage_block(const Features& from, int64_t channel, int valid, T* staged) const {
    const View<E> student(from, sample, channel), teacher(difference ? task.teacher : from, sample, channel);
    const Runs runs = runs_of(plan, student, teacher, valid);
    if (runs.count) stage<T, E, difference>(plan, student, teacher, runs, valid, staged);
    return runs.count;
  }

  void run(int64_t first, int64_t count) {
    constexpr int group = 2 * lanes<T>;
    const int64_t block = int64_t(group) * plan.staged_groups;
    const auto [plane, other, scratch, staged, other_staged, sums] = workspace;
    for (int64_t start = first; start < first + count; start += block) {
      const int valid = int(first + count - start < block ? first + count - start : block);
      const bool own = stage_block(task.student, start, valid, staged);
      const bool others = !difference && stage_block(task.teacher, start, valid, other_staged);
      const View<E> gradient(task.gradient, sample, start);
      const Runs runs = backward ? runs_of(plan, gradient, gradient, valid) : Runs{};
      for (int at = 0; at < valid; at += group) {
        const int part = valid - at < group ? valid - at : group;
        const int64_t offset = int64_t(at) * plan.staged_pitch;
        load(plane, task.student, start + at, part, own ? staged + offset : nullptr);
        if (!difference) load(other, task.teacher, start + at, part, others ? other_staged + offset : nullptr);
        visit_columns();
        if constexpr (backward) store(plane, start + at, part, runs.count ? staged + offset : nullptr);
      }
      if (backward) unstage(plan, staged, runs, gradient, task.stream);
    }
    if (backward && task.stream) fence_streams();
  }
};

template <typename T, typename E, Distance distance>
static void run(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, double* sums,
                const void* weights, void* memory) {
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
    ADD_OPS_UNROLL
    for (int k = 0; k < n; ++k) square[k] = workspace.sums[i + k];
    transpose<T>(square);
    Vector<double, n> total = {};
    ADD_OPS_UNROLL
    for (int k = 0; k < n; ++k) total += __builtin_convertvector(square[k], Vector<double, n>);
    std::memcpy(sums + i, &total, sizeof(double) * size_t(entries - i < n ? entries - i : n));
  }
}

// Cosine divides by coefficients that may be as small as rounding noise, so it is computed in float64 throughout.
static void run_any(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, double* sums,
                    const void* weights, void* memory) {
  const auto call = [&](auto compute, auto element) {
    using T = decltype(compute);
    using E = decltype(element);
    if constexpr (sizeof(T) == 8)
      if (task.distance == Distance::cosine)
        return run<T, E, Distance::cosine>(task, sample, first, count, sums, weights, memory);
    if constexpr (sizeof(T) == 4 || sizeof(E) == 8) {
      if (task.distance == Distance::l2)
        return run<T, E, Distance::l2>(task, sample, first, count, sums, weights, memory);
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

void spectral_forward(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, double* sums,
                      void* workspace) {
  run_any(task, sample, first, count, sums, nullptr, workspace);
}

void spectral_backward(const SpectralTask& task, int64_t sample, int64_t first, int64_t count, const void* weights,
                       void* workspace) {
  run_any(task, sample, first, count, nullptr, weights, workspace);
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
