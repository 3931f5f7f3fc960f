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

// Bytes of scratch memory that a row of n values needs.
constexpr int64_t sort_scratch(int64_t n, bool wide) {
  return 2 * n * static_cast<int64_t>(wide ? sizeof(Keyed<uint64_t>) : sizeof(Keyed<uint32_t>));
}

// Sorts `count` rows of n values in place, ascending, NaN last, ties by place; index receives int16 or int32 places.
ADD_OPS_DECLARE_KERNEL(void, sort_rows, (bool wide, bool short_index, int64_t count, int64_t n, void* values, void* index,
                                         void* scratch))

}  // namespace add_ops
