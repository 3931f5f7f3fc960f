// Distances of all pairs of rows, and what the loss makes of them. Compiled once per instruction set.
#include "contrastive_loss.h"

#include "simd.h"

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

template <int half, typename V, int... I>
ADD_OPS_INLINE V swap_halves(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ half)...);
}
template <typename T, int half = lanes<T> / 2>
ADD_OPS_INLINE T sum_lanes(Vec<T> v) {
  v += swap_halves<half>(v, std::make_integer_sequence<int, lanes<T>>());
  if constexpr (half > 1)
    return sum_lanes<T, half / 2>(v);
  else
    return v[0];
}

// |gap|^p and its slope, up to the factor p.
template <bool squared, typename T>
ADD_OPS_INLINE Vec<T> power(Vec<T> gap) {
  if constexpr (squared)
    return gap * gap;
  else
    return gap < 0 ? -gap : gap;
}
template <bool squared, typename T>
ADD_OPS_INLINE Vec<T> slope(Vec<T> gap) {
  if constexpr (squared)
    return gap;
  else
    return __builtin_convertvector((gap < 0) - (gap > 0), Vec<T>);
}

// kStudents rows of the student, the last one of the batch again where there are less, against `Teachers` of the
// teacher.
template <typename T, bool squared, int Teachers>
struct Tile {
  const T *student[kStudents], *teacher[Teachers];
  double distance[kStudents][Teachers];

  ADD_OPS_INLINE Tile(const Pairs& pairs, int64_t i, int64_t j) {
    ADD_OPS_UNROLL
    for (int a = 0; a < kStudents; ++a) student[a] = static_cast<const T*>(pairs.student) + row(pairs, i + a);
    ADD_OPS_UNROLL
    for (int b = 0; b < Teachers; ++b) teacher[b] = static_cast<const T*>(pairs.teacher) + row(pairs, j + b);
    Vec<T> sum[kStudents][Teachers] = {};
    for (int64_t m = 0; m < pairs.length; m += lanes<T>) {
      Vec<T> t[Teachers];
      ADD_OPS_UNROLL
      for (int b = 0; b < Teachers; ++b) t[b] = load<Vec<T>>(teacher[b] + m);
      ADD_OPS_UNROLL
      for (int a = 0; a < kStudents; ++a) {
        const auto s = load<Vec<T>>(student[a] + m);
        ADD_OPS_UNROLL
        for (int b = 0; b < Teachers; ++b) sum[a][b] += power<squared, T>(s - t[b]);
      }
    }
    ADD_OPS_UNROLL
    for (int a = 0; a < kStudents; ++a)
      for (int b = 0; b < Teachers; ++b) distance[a][b] = sum_lanes<T>(sum[a][b]);
  }

  static int64_t row(const Pairs& pairs, int64_t index) {
    return (index < pairs.batch ? index : pairs.batch - 1) * pairs.stride;
  }

  ADD_OPS_INLINE void add_gradient(const Pairs& pairs, const T (&factor)[kStudents][Teachers], int64_t i,
                                   T* gradient) const {
    for (int64_t m = 0; m < pairs.length; m += lanes<T>) {
      Vec<T> t[Teachers];
      ADD_OPS_UNROLL
      for (int b = 0; b < Teachers; ++b) t[b] = load<Vec<T>>(teacher[b] + m);
      ADD_OPS_UNROLL
      for (int a = 0; a < kStudents; ++a) {
        T* to = gradient + row(pairs, i + a) + m;
        const auto s = load<Vec<T>>(student[a] + m);
        auto sum = load<Vec<T>>(to);
        ADD_OPS_UNROLL
        for (int b = 0; b < Teachers; ++b) sum += factor[a][b] * slope<squared, T>(s - t[b]);
        store(to, sum);
      }
    }
  }
};

// What a pair adds to the loss, and the derivative of that by its distance. Different labels repel up to the margin.
struct Term {
  double value, slope;
};
ADD_OPS_INLINE Term term_of(const Pairs& pairs, int64_t i, int64_t j, double distance) {
  if (pairs.labels[i] == pairs.labels[j]) {
    const double weight = i == j ? pairs.own : pairs.same;
    return {weight * distance, weight};
  }
  if (distance > pairs.margin) return {0, 0};
  return {pairs.different * (pairs.margin - distance), -pairs.different};
}

template <typename T, bool squared, int Teachers>
double sum_terms(const Pairs& pairs, int64_t i, int64_t j) {
  const Tile<T, squared, Teachers> tile(pairs, i, j);
  double sum = 0;
  for (int a = 0; a < kStudents && i + a < pairs.batch; ++a)
    for (int b = 0; b < Teachers; ++b) sum += term_of(pairs, i + a, j + b, tile.distance[a][b]).value;
  return sum;
}

template <typename T, bool squared, int Teachers>
void add_slopes(const Pairs& pairs, int64_t i, int64_t j, T* gradient) {
  const Tile<T, squared, Teachers> tile(pairs, i, j);
  T factor[kStudents][Teachers] = {};
  bool any = false;
  for (int a = 0; a < kStudents && i + a < pairs.batch; ++a)
    for (int b = 0; b < Teachers; ++b) {
      const double distance = tile.distance[a][b], slope = term_of(pairs, i + a, j + b, distance).slope;
      if (slope == 0) continue;
      factor[a][b] = static_cast<T>(distance == distance ? (squared ? 2 * slope : slope) : distance);  // NaN stays NaN
      any = true;
    }
  if (any) tile.add_gradient(pairs, factor, i, gradient);
}

template <typename T, bool squared>
double rows(const Pairs& pairs, int64_t first, int64_t last) {
  double sum = 0;
  for (int64_t i = first; i < last; i += kStudents) {
    int64_t j = 0;
    for (; j + 2 <= pairs.batch; j += 2) sum += sum_terms<T, squared, 2>(pairs, i, j);
    if (j < pairs.batch) sum += sum_terms<T, squared, 1>(pairs, i, j);
  }
  return sum;
}

template <typename T, bool squared>
void rows_backward(const Pairs& pairs, int64_t first, int64_t last, T* gradient) {
  for (int64_t i = first; i < last; i += kStudents) {
    int64_t j = 0;
    for (; j + 2 <= pairs.batch; j += 2) add_slopes<T, squared, 2>(pairs, i, j, gradient);
    if (j < pairs.batch) add_slopes<T, squared, 1>(pairs, i, j, gradient);
  }
}

}  // namespace

double contrastive_rows(const Pairs& pairs, int64_t first, int64_t last) {
  if (pairs.wide)
    return pairs.squared ? rows<double, true>(pairs, first, last) : rows<double, false>(pairs, first, last);
  return pairs.squared ? rows<float, true>(pairs, first, last) : rows<float, false>(pairs, first, last);
}

void contrastive_rows_backward(const Pairs& pairs, int64_t first, int64_t last, void* gradient) {
  const auto run = [&](auto* to) {
    if (pairs.squared)
      rows_backward<std::remove_pointer_t<decltype(to)>, true>(pairs, first, last, to);
    else
      rows_backward<std::remove_pointer_t<decltype(to)>, false>(pairs, first, last, to);
  };
  if (pairs.wide) return run(static_cast<double*>(gradient));
  run(static_cast<float*>(gradient));
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
