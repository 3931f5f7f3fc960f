// What the driver (contrastive_loss.cpp) and its kernels (contrastive_loss_kernel.cpp) share.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace add_ops {

constexpr int kStudents = 4;   // student rows that share the loads of a teacher row
constexpr int kItemRows = 16;  // student rows in a work item

// All pairs of one view: student row i stands against every teacher row, the distance is sum |s - t|^p.
struct Pairs {
  bool wide, squared;             // float64; p = 2, else 1
  int64_t batch, length, stride;  // the last two of rows, in elements
  const void *student, *teacher;
  const int64_t* labels;
  double own, same, different;  // weights of a pair (i, i), of equal labels, of different ones
  double margin;
};

// Of the student rows [first, last): sum of weight · D, for different labels of weight · max(0, margin - D).
ADD_OPS_DECLARE_KERNEL(double, contrastive_rows, (const Pairs& pairs, int64_t first, int64_t last))

// Adds the gradient of that to the rows of `gradient`, which have the same stride.
ADD_OPS_DECLARE_KERNEL(void, contrastive_rows_backward,
                       (const Pairs& pairs, int64_t first, int64_t last, void* gradient))

}  // namespace add_ops
