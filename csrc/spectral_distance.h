// What spectral_distance.cpp (arguments, plan, threads) and spectral_distance_kernel.cpp (one copy per instruction set)
// tell each other. Plain data only: see dispatch.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"

namespace add_ops {

enum class Element { float32, float64, float16, bfloat16 };
enum class Distance { l2, cosine, gaussian };

struct Features {
  void* data;
  int64_t stride[4];  // of (B, C, H, W), in elements
};

// One in-place step of a transform along an axis: `blocks` runs of radix·rest slots, each holding `rest` DFTs of
// `radix` points that lie `rest` slots apart.
template <typename T>
struct Stage {
  int radix, blocks, rest;
  const T* twiddles;  // [rest][radix - 1] (cos, -sin), or null where radix and rest are coprime and none are needed
  const T* matrix;    // [2][radix / 2][radix / 2], cos then sin, of an odd radix that has no codelet, else null
};

template <typename T>
struct Axis {
  int length, stages;
  Stage<T> stage[32];
  const int* slot_of_index;      // where position n has to stand before the transform,
  const int* slot_of_frequency;  // where frequency k stands after it: nothing is ever reordered in memory
};

template <typename T>
struct Plan {
  int height, width, pitch;     // a plane is `height` rows of `pitch` slots
  int staged_pitch;             // from one channel to the next where channels are copied on their way to the plane,
  int staged_groups;            // 2·lanes channels times this at once
  bool small;                   // the whole plane fits the first-level cache
  Axis<T> rows, columns;        // transforms along the rows (length width) and along the columns (length height)
  const int* slot_of_pixel;     // [height · width]
  const int* row_of_frequency;  // [height], the slot where the row of frequency u begins
};

struct SpectralTask {
  const void* plan;  // Plan<double> if wide, else Plan<float>
  bool wide;         // compute in float64
  bool stream;       // the gradient is too large for the cache: write it around the cache
  Distance distance;
  Element element;
  Features student, teacher, gradient;
  double exponent;  // gaussian: d = 1 - exp(-exponent·|DFT(S - T)|²)
};

// Both work on `count` channels from `first` on, of one sample. Half a spectrum is `(width/2 + 1)·height` entries,
// v-major. The forward writes them as sums over the channels: for l2 twice that of |DFT(S - T)|², for gaussian that of
// d, for cosine that of 1 - d. The backward reads them as weights (double if wide, else float): the symmetrised
// upstream gradient times the distance's constant factors.
ADD_OPS_DECLARE_KERNEL(size_t, spectral_workspace, (const SpectralTask& task))  // bytes per thread, 64-byte aligned
ADD_OPS_DECLARE_KERNEL(void, spectral_forward,
                       (const SpectralTask& task, int64_t sample, int64_t first, int64_t count, double* sums,
                        void* workspace))
ADD_OPS_DECLARE_KERNEL(void, spectral_backward,
                       (const SpectralTask& task, int64_t sample, int64_t first, int64_t count, const void* weights,
                        void* workspace))

}  // namespace add_ops
