// What the driver (quantile_distance.cpp) and its kernels (quantile_distance_kernel.cpp) share.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace add_ops {

// The steps of two quantile functions: in step t, of width[t] > 0, point x[t] of one stands against y[t] of the other.
struct Steps {
  int64_t count;
  int32_t *x, *y;
  double* width;
};

// One pair of sorted rows. Where a side has no weights its levels are shared by all rows and `order` is not read; where
// neither has, so are the steps, and `merged` says that they are there.
struct QuantileRow {
  bool wide, merged;      // float64 values
  bool x_short, y_short;  // int16 orders
  int64_t n, m;
  const void *x, *y;  // (n), (m), ascending
  const void *x_order, *y_order;
  const double *x_weights, *y_weights;  // of the points, or null
  double *x_levels, *y_levels;          // (n), (m): cumulative weights, scratch where there are weights
  Steps steps;                          // scratch of n + m, unless merged
  double p;
};

// The steps of two rows of levels, ascending to 1; those without width are left out.
ADD_OPS_DECLARE_KERNEL(void, merge_levels, (int64_t n, const double* x, int64_t m, const double* y, Steps* steps))

// Sum of width · |x - y|^p.
ADD_OPS_DECLARE_KERNEL(double, quantile_row, (QuantileRow * row))

// Its gradients, times `grad`; sums is scratch of n + m.
ADD_OPS_DECLARE_KERNEL(void, quantile_row_backward,
                       (QuantileRow * row, double grad, double* sums, void* x_grad, void* y_grad))

}  // namespace add_ops
