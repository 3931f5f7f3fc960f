// What the driver (view_histogram.cpp) and its kernels (view_histogram_kernel.cpp) share.
//
// The grid is cut into boxes of at most 256 positions. Along a view, T = const + sum(step_i * n_i) is linear, so all
// boxes of one extent hold the same offsets t = T - T(first) in the same order: sorted once, they serve every box, and
// only the places where the sorted list is cut into bins move from box to box. Samples lie side by side in the lanes of
// a 64-byte row.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace add_ops {

constexpr int kBox = 256;       // positions in a box: 16 KiB of rows, half of a level-1 cache
constexpr int kRowBytes = 64;   // 16 floats or 8 doubles: a row holds one position (or one bin) of as many samples
constexpr int kShapes = 8;      // a box may be cut short at the end of each axis
constexpr int kItems = 32;      // work items to aim at, whatever the number of threads; the most parts of the boxes
constexpr uint32_t kDoubt = 3;  // what the sum of two truncated levels may be off by, see find_cuts

enum class Feature { float32, float64, float16, bfloat16 };

// Everything below has the axes in memory order, the axis of the largest stride first.
struct BoxShape {
  int extent[3];
  int count;  // positions in the box
  int run;    // so many of them, in order, lie side by side in memory (of both arrays in the backward)
};

struct View {
  int64_t step[3], base, divisor;  // T = base + sum(step * n), bin = T * bins / divisor
  double scale;                    // bin = T * bins * scale >> shift, but for the last units
  bool exact;                      // a box spans so many bins that positions are divided one by one
};

// T(first position) * bins = bin * divisor + rest.
struct BoxStart {
  int64_t scaled, bin;
  uint32_t level;  // rest * scale + kDoubt
};

// The positions of a box of one shape along one view: in order of t for the forward, in order of memory for the
// backward.
struct BoxTable {
  uint32_t level[kBox + 16];  // t * bins * scale; beyond the box's positions, the first one's again
  int64_t t[kBox];
  uint16_t row[kBox + 8];  // byte offset of the position's row; the row at 0 is zero
  int64_t corner;          // T(first) - T(origin of the box)
};

struct Grid {
  int64_t length[3], boxes[3];
  int box[3];
  BoxShape shape[kShapes];
  int64_t bins;
  int views;
  int shift;              // levels are in units of 1 / 2^shift bin
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
ADD_OPS_DECLARE_KERNEL(void, histogram_levels,
                       (bool wide, int64_t bins, const void* grad, const void* attention, int64_t stride, int lanes,
                        void* rows))
// out = x * factor[lane][0] * factor[lane][1] * (sum over the views of the row of the position's bin), with scratch for
// a BoxStart per view.
ADD_OPS_DECLARE_KERNEL(void, histogram_gradient,
                       (const Grid& grid, Feature type, const Array& features, const Array& out, const Item& item,
                        const double (*factor)[2], const void* rows, BoxStart* start))

}  // namespace add_ops
