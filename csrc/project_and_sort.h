// What the driver (project_and_sort.cpp) and its kernels (project_and_sort_kernel.cpp) share.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace add_ops {

// A key in the order of its float, above its place in the row: both travel together, so every sort below is stable.
template <typename Key>
struct Keyed {
  Key key;
  int32_t place;
};

// Rows of up to so many float32 values are sorted side by side, as many as a vector has lanes, at most kRowsMost.
constexpr int64_t kNetworkMost = 1024;
constexpr int64_t kRowsMost = 8;

// Bytes of scratch memory that rows of n values need.
constexpr int64_t sort_scratch(int64_t n, bool wide) {
  if (!wide && n <= kNetworkMost) return 8 * kRowsMost * (n + kRowsMost) + 64;
  return 2 * n * static_cast<int64_t>(wide ? sizeof(Keyed<uint64_t>) : sizeof(Keyed<uint32_t>));
}

// Sorts `count` rows of n values in place, ascending, NaN last, ties by place; index receives int16 or int32 places.
ADD_OPS_DECLARE_KERNEL(void, sort_rows,
                       (bool wide, bool short_index, int64_t count, int64_t n, void* values, void* index,
                        void* scratch))

}  // namespace add_ops
