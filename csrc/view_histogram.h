// What the driver (view_histogram.cpp) and its kernels (view_histogram_kernel.cpp) share.
//
// The grid is cut into boxes of at most 256 positions, and these into bins: view_histogram_plan.h begins with an
// example. Samples lie side by side in the lanes of a 64-byte row.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace add_ops {

constexpr int kBox = 256;      // positions in a box: 16 KiB of rows, half of a level-1 cache
constexpr int kRowBytes = 64;  // 16 floats or 8 doubles: a row holds one position (or one bin) of as many samples
constexpr int kShapes = 8;     // of boxes: bit i of a shape's index says that it is cut short at the end of axis i
constexpr int kItems = 32;     // work items to aim at, whatever the number of threads; the most parts of the boxes
constexpr uint32_t kFixedPointError = 3;  // units that the sum of two truncated numbers may be off by

enum class Feature { float32, float64, float16, bfloat16 };

// Everything below has the axes in memory order, the axis of the largest stride first.
struct BoxShape {
  int extent[3];
  int count;  // positions in the box
  int run;    // so many of them, in order, lie side by side in memory (of both arrays in the backward)
};

struct View {
  int64_t step[3], base, divisor;  // T = base + sum(step * n), bin = T * bins / divisor
  double to_fixed_point;           // T * bins * to_fixed_point: its place in bins, in fixed point
  bool always_divide;              // a box may span more bins than positions, which are then divided one by one
};

// Of the lowest position of a box along a view: T * bins = numerator = bin * divisor + rest.
struct BoxStart {
  int64_t numerator, bin;
  uint32_t rest_in_bins;  // rest / divisor in fixed point, plus kFixedPointError
};

// The positions of a box of one shape along one view: by distance for the forward, as in memory for the backward.
struct BoxTable {
  uint32_t distance_in_bins[kBox + 16];  // in fixed point; beyond the box's positions, the first one's again
  int64_t distance[kBox];                // T - T(lowest position of the box)
  uint16_t row[kBox + 8];                // byte offset of the position's row; the row at 0 is zero
  int64_t lowest_corner;                 // T(lowest position) - T(origin of the box)
};

struct Grid {
  int64_t length[3], boxes[3];
  int box[3];
  BoxShape shape[kShapes];
  int64_t bins;
  int views;
  int fraction_bits;      // of fixed point: its units are 1 / 2^fraction_bits of a bin
  const View* view;       // (views,)
  const BoxTable* table;  // (kShapes, views)
};

struct Array {
  void* data;
  int64_t batch_stride, stride[3];  // in elements
};

// One work item: the samples [first, first + lanes) and the boxes [begin, end).
struct Item {
  int64_t first, batch, begin, end;
};

// Adds (x * scale[lane])^2 of the item's boxes to `rows`, row offset[k] + j for bin j of view k.
ADD_OPS_DECLARE_KERNEL(void, histogram_boxes,
                       (const Grid& grid, Feature type, const Array& features, const Item& item, const double* scale,
                        void* rows, const int64_t* offset))
// Sums `count` rows into `sum` (lanes of float64).
ADD_OPS_DECLARE_KERNEL(void, histogram_total, (bool wide, int64_t count, const void* rows, double* sum))
// Adds up the parts of one view, part c holding the bins range[c]; out[lane * out_stride + j] = factor[lane] * sum.
ADD_OPS_DECLARE_KERNEL(void, histogram_finish,
                       (bool wide, int64_t bins, int parts, const void* const* rows, const int64_t (*range)[2],
                        const double* factor, int lanes, void* out, int64_t out_stride))
// rows[j] = grad[j] - sum(grad * attention) for one view; the lanes are `stride` elements apart in grad and attention.
ADD_OPS_DECLARE_KERNEL(void, histogram_centre,
                       (bool wide, int64_t bins, const void* grad, const void* attention, int64_t stride, int lanes,
                        void* rows))
// out = x * factor[lane][0] * factor[lane][1] * (sum over the views of the row of the position's bin), with scratch for
// a BoxStart per view.
ADD_OPS_DECLARE_KERNEL(void, histogram_gradient,
                       (const Grid& grid, Feature type, const Array& features, const Array& out, const Item& item,
                        const double (*factor)[2], const void* rows, BoxStart* start))

}  // namespace add_ops
