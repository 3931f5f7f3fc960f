// Scratch memory in lines of a cache, aligned to them and uninitialised: each page is first written by the thread that
// uses it.
#pragma once

#include <memory>

namespace add_ops {

constexpr int kLineBytes = 64;

struct alignas(kLineBytes) Line {
  char bytes[kLineBytes];
};

using Scratch = std::unique_ptr<Line[]>;  // Scratch lines(new Line[count])

}  // namespace add_ops
