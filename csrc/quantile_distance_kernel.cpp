// The merge of two quantile functions, and what is summed over its steps. Compiled once per instruction set.
#include "quantile_distance.h"

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

constexpr int kLanes = 8;  // sums that run side by side

template <typename Index>
void cumulate(int64_t n, const double* weights, const Index* order, double* levels) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) levels[i] = sum += weights[order[i]];
  for (int64_t i = 0; i < n; ++i) levels[i] /= sum;
}

void cumulate(int64_t n, const double* weights, bool short_order, const void* order, double* levels) {
  if (weights == nullptr) return;
  if (short_order) return cumulate(n, weights, static_cast<const int16_t*>(order), levels);
  cumulate(n, weights, static_cast<const int32_t*>(order), levels);
}

void merge(QuantileRow* row) {
  if (row->merged) return;
  cumulate(row->n, row->x_weights, row->x_short, row->x_order, row->x_levels);
  cumulate(row->m, row->y_weights, row->y_short, row->y_order, row->y_levels);
  merge_levels(row->n, row->x_levels, row->m, row->y_levels, &row->steps);
}

inline double magnitude(double value) { return __builtin_fabs(value); }

struct First {
  static double power(double gap, double) { return magnitude(gap); }
  static double slope(double gap, double) { return gap == gap ? (gap > 0) - (gap < 0) : gap; }  // NaN stays NaN
};
struct Second {
  static double power(double gap, double) { return gap * gap; }
  static double slope(double gap, double) { return 2 * gap; }
};
struct Any {
  static double power(double gap, double p) { return __builtin_pow(magnitude(gap), p); }
  static double slope(double gap, double p) { return p * __builtin_pow(magnitude(gap), p - 1) * First::slope(gap, 1); }
};

template <typename Float, typename Power>
double sum_steps(const QuantileRow& row) {
  const Float *x = static_cast<const Float*>(row.x), *y = static_cast<const Float*>(row.y);
  const Steps& steps = row.steps;
  double sums[kLanes] = {};
  int64_t t = 0;
  for (; t + kLanes <= steps.count; t += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) {
      const double gap = static_cast<double>(x[steps.x[t + lane]]) - static_cast<double>(y[steps.y[t + lane]]);
      sums[lane] += steps.width[t + lane] * Power::power(gap, row.p);
    }
  for (; t < steps.count; ++t) {
    const double gap = static_cast<double>(x[steps.x[t]]) - static_cast<double>(y[steps.y[t]]);
    sums[t % kLanes] += steps.width[t] * Power::power(gap, row.p);
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// float64 sums: one point may stand against all of the other side.
template <typename Float, typename Power>
void spread_steps(const QuantileRow& row, double grad, double* sums, Float* x_grad, Float* y_grad) {
  const Float *x = static_cast<const Float*>(row.x), *y = static_cast<const Float*>(row.y);
  const Steps& steps = row.steps;
  double *x_sums = sums, *y_sums = sums + row.n;
  for (int64_t i = 0; i < row.n + row.m; ++i) sums[i] = 0;
  for (int64_t t = 0; t < steps.count; ++t) {
    const int32_t i = steps.x[t], j = steps.y[t];
    const double slope =
        grad * steps.width[t] * Power::slope(static_cast<double>(x[i]) - static_cast<double>(y[j]), row.p);
    x_sums[i] += slope;
    y_sums[j] -= slope;
  }
  for (int64_t i = 0; i < row.n; ++i) x_grad[i] = static_cast<Float>(x_sums[i]);
  for (int64_t j = 0; j < row.m; ++j) y_grad[j] = static_cast<Float>(y_sums[j]);
}

template <typename Float>
double forward(const QuantileRow& row) {
  if (row.p == 1) return sum_steps<Float, First>(row);
  if (row.p == 2) return sum_steps<Float, Second>(row);
  return sum_steps<Float, Any>(row);
}

template <typename Float>
void backward(const QuantileRow& row, double grad, double* sums, void* x_grad, void* y_grad) {
  Float *to_x = static_cast<Float*>(x_grad), *to_y = static_cast<Float*>(y_grad);
  if (row.p == 1) return spread_steps<Float, First>(row, grad, sums, to_x, to_y);
  if (row.p == 2) return spread_steps<Float, Second>(row, grad, sums, to_x, to_y);
  spread_steps<Float, Any>(row, grad, sums, to_x, to_y);
}

}  // namespace

void merge_levels(int64_t n, const double* x, int64_t m, const double* y, Steps* steps) {
  int64_t i = 0, j = 0, t = 0;
  double level = 0;
  while (i < n && j < m) {  // without branches; a level that is NaN takes both sides on
    const double at_x = x[i], at_y = y[j], next = at_x < at_y ? at_x : at_y;
    steps->x[t] = static_cast<int32_t>(i);
    steps->y[t] = static_cast<int32_t>(j);
    steps->width[t] = next - level;
    t += !(next <= level);
    level = next;
    i += !(at_x > at_y);
    j += !(at_y > at_x);
  }
  steps->count = t;
}

double quantile_row(QuantileRow* row) {
  merge(row);
  return row->wide ? forward<double>(*row) : forward<float>(*row);
}

void quantile_row_backward(QuantileRow* row, double grad, double* sums, void* x_grad, void* y_grad) {
  merge(row);
  if (row->wide) return backward<double>(*row, grad, sums, x_grad, y_grad);
  backward<float>(*row, grad, sums, x_grad, y_grad);
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
