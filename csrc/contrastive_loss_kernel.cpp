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

// kStudents rows of the student from the i-th on, the last one of the batch again where there are less, against
// `Teachers` of the teacher from the j-th on.
template <typename T, bool squared, int Teachers>
struct Tile {
  static constexpr int teachers = Teachers;
  const Pairs& pairs;
  int64_t i, j, student[kStudents], teacher[Teachers];  // where the rows begin
  double distance[kStudents][Teachers];

  ADD_OPS_INLINE Tile(const Pairs& all, int64_t first_student, int64_t first_teacher)
      : pairs(all), i(first_student), j(first_teacher) {
    ADD_OPS_UNROLL
    for (int a = 0; a < kStudents; ++a) student[a] = (i + a < pairs.batch ? i + a : pairs.batch - 1) * pairs.stride;
    ADD_OPS_UNROLL
    for (int b = 0; b < Teachers; ++b) teacher[b] = (j + b) * pairs.stride;
    Vec<T> sum[kStudents][Teachers] = {};
    for_gaps([&](int64_t, int a, const auto& gap) __attribute__((always_inline)) {
      ADD_OPS_UNROLL
      for (int b = 0; b < Teachers; ++b) sum[a][b] += power<squared, T>(gap[b]);
    });
    ADD_OPS_UNROLL
    for (int a = 0; a < kStudents; ++a)
      for (int b = 0; b < Teachers; ++b) distance[a][b] = sum_lanes<T>(sum[a][b]);
  }

  // Calls body(place in the rows, a, gaps to the teachers) for student a, a vector at a time.
  template <typename Body>
  ADD_OPS_INLINE void for_gaps(const Body& body) const {
    for (int64_t m = 0; m < pairs.length; m += lanes<T>) {
      Vec<T> t[Teachers], gap[Teachers];
      ADD_OPS_UNROLL
      for (int b = 0; b < Teachers; ++b) t[b] = load<Vec<T>>(static_cast<const T*>(pairs.teacher) + teacher[b] + m);
      ADD_OPS_UNROLL
      for (int a = 0; a < kStudents; ++a) {
        const auto s = load<Vec<T>>(static_cast<const T*>(pairs.student) + student[a] + m);
        ADD_OPS_UNROLL
        for (int b = 0; b < Teachers; ++b) gap[b] = s - t[b];
        body(m, a, gap);
      }
    }
  }

  ADD_OPS_INLINE void add_gradient(const T (&factor)[kStudents][Teachers], T* gradient) const {
    for_gaps([&](int64_t m, int a, const auto& gap) __attribute__((always_inline)) {
      T* to = gradient + student[a] + m;
      auto sum = load<Vec<T>>(to);
      ADD_OPS_UNROLL
      for (int b = 0; b < Teachers; ++b) sum += factor[a][b] * slope<squared, T>(gap[b]);
      store(to, sum);
    });
  }
};

template <typename T, bool squared, typename Visit>
void for_tiles(const Pairs& pairs, int64_t first, int64_t last, const Visit& visit) {
  for (int64_t i = first; i < last; i += kStudents) {
    int64_t j = 0;
    for (; j + 2 <= pairs.batch; j += 2) visit(Tile<T, squared, 2>(pairs, i, j));
    if (j < pairs.batch) visit(Tile<T, squared, 1>(pairs, i, j));
  }
}

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

template <typename T, bool squared>
double sum_terms(const Pairs& pairs, int64_t first, int64_t last) {
  double sum = 0;
  for_tiles<T, squared>(pairs, first, last, [&](const auto& tile) {
    for (int a = 0; a < kStudents && tile.i + a < pairs.batch; ++a)
      for (int b = 0; b < tile.teachers; ++b) sum += term_of(pairs, tile.i + a, tile.j + b, tile.distance[a][b]).value;
  });
  return sum;
}

template <typename T, bool squared>
void add_slopes(const Pairs& pairs, int64_t first, int64_t last, T* gradient) {
  for_tiles<T, squared>(pairs, first, last, [&](const auto& tile) {
    constexpr int teachers = std::decay_t<decltype(tile)>::teachers;
    T factor[kStudents][teachers] = {};
    bool any = false;
    for (int a = 0; a < kStudents && tile.i + a < pairs.batch; ++a)
      for (int b = 0; b < teachers; ++b) {
        const double distance = tile.distance[a][b], slope = term_of(pairs, tile.i + a, tile.j + b, distance).slope;
        if (slope == 0) continue;
        factor[a][b] = static_cast<T>(distance == distance ? (squared ? 2 * slope : slope) : distance);  // NaN stays
        any = true;
      }
    if (any) tile.add_gradient(factor, gradient);
  });
}

}  // namespace

double contrastive_rows(const Pairs& pairs, int64_t first, int64_t last) {
  if (pairs.wide)
    return pairs.squared ? sum_terms<double, true>(pairs, first, last) : sum_terms<double, false>(pairs, first, last);
  return pairs.squared ? sum_terms<float, true>(pairs, first, last) : sum_terms<float, false>(pairs, first, last);
}

void contrastive_rows_backward(const Pairs& pairs, int64_t first, int64_t last, void* gradient) {
  const auto run = [&](auto* to) {
    if (pairs.squared)
      add_slopes<std::remove_pointer_t<decltype(to)>, true>(pairs, first, last, to);
    else
      add_slopes<std::remove_pointer_t<decltype(to)>, false>(pairs, first, last, to);
  };
  if (pairs.wide) return run(static_cast<double*>(gradient));
  run(static_cast<float*>(gradient));
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
