// What the driver (attention_sum.cpp) and its kernel (attention_sum_kernel.cpp) share.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace add_ops {

// slope[i] = scale · exp(min(gamma · distance[i], limit)); the sum of slope · distance. Float32, or float64 where
// `wide`.
ADD_OPS_DECLARE_KERNEL(double, attention_sum,
                       (bool wide, int64_t count, const void* distance, double gamma, double limit, double scale,
                        void* slope))

}  // namespace add_ops
