// The attention of every frequency and the sum that it weights. Compiled once per instruction set.
#include "attention_sum.h"

#include "simd.h"

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

constexpr double kNothing = -708;  // the least exponent that `exponential` takes: below, the attention is 0

ADD_OPS_INLINE Vec<double> attend(Vec<double> distance, double gamma, double limit, double scale) {
  const Vec<double> asked = gamma * distance, exponent = asked > limit ? Vec<double>{} + limit : asked;
  const auto [power, m1] = exponential<double>(exponent);
  return exponent < kNothing ? Vec<double>{} : scale * (power + power * m1);
}

template <typename T>
double sum(int64_t count, const T* distance, double gamma, double limit, double scale, T* slope) {
  constexpr int n = lanes<double>;
  Vec<double> sums{};
  T rest[n] = {}, rest_slope[n];
  for (int64_t i = 0; i < count; i += n) {
    const bool whole = i + n <= count;
    if (!whole) std::memcpy(rest, distance + i, static_cast<size_t>(count - i) * sizeof(T));
    const auto d = load_as<double>(whole ? distance + i : rest);
    const auto w = attend(d, gamma, limit, scale);
    store_as<double>(whole ? slope + i : rest_slope, w);
    if (!whole) std::memcpy(slope + i, rest_slope, static_cast<size_t>(count - i) * sizeof(T));
    sums += w * d;  // of zeros beyond the end: 0
  }
  double total = 0;
  for (int lane = 0; lane < n; ++lane) total += sums[lane];
  return total;
}

}  // namespace

double attention_sum(bool wide, int64_t count, const void* distance, double gamma, double limit, double scale,
                     void* slope) {
  const auto run = [&](auto* to) {
    return sum(count, static_cast<const std::remove_pointer_t<decltype(to)>*>(distance), gamma, limit, scale, to);
  };
  return wide ? run(static_cast<double*>(slope)) : run(static_cast<float*>(slope));
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
