// Between feature maps and the planes of lanes<T> channel pairs that spectral_distance_kernel.cpp transforms.
//
// Maps whose channels are contiguous pass through `staged`, a row of plan.staged_pitch numbers per channel: a few
// hundred KiB are read or written strictly in order, which hardware foresees, and channels are transposed in the cache.
#pragma once

#include "spectral_distance_fft.h"

namespace add_ops {
namespace ADD_OPS_ISA {

// Channels of one sample from `channel` on.
template <typename E>
struct View {
  E* data;
  int64_t c, h, w;
  View(E* start, int64_t pitch, int width) : data(start), c(pitch), h(width), w(1) {}
  View(const Features& f, int64_t sample, int64_t channel)
      : data(static_cast<E*>(f.data) + sample * f.stride[0] + channel * f.stride[1]),
        c(f.stride[1]),
        h(f.stride[2]),
        w(f.stride[3]) {}
  bool planar(int width) const { return w == 1 && h == width; }
};

// What stands side by side both in the maps and in `staged`: `count` runs of `length` numbers, or none.
struct Runs {
  int count;
  int64_t length;
};
template <typename T, typename E>
static Runs runs_of(const Plan<T>& plan, const View<E>& a, const View<E>& b, int valid) {
  if (!a.planar(plan.width) || !b.planar(plan.width)) return {0, 0};
  const int64_t pixels = int64_t(plan.height) * plan.width;
  const bool single = plan.staged_pitch == pixels && a.c == pixels && b.c == pixels;
  const Runs runs = single ? Runs{1, valid * pixels} : Runs{valid, pixels};
  return runs.length < lanes<T> ? Runs{0, 0} : runs;
}

// Student, or student - teacher. Channels that a whole number of pairs of vectors lacks are zero.
template <typename T, typename E, bool difference>
static void stage(const Plan<T>& plan, const View<E>& student, const View<E>& teacher, Runs runs, int valid,
                  T* staged) {
  constexpr int n = lanes<T>;
  const size_t lacking = size_t((2 * n - valid % (2 * n)) % (2 * n));
  std::memset(staged + int64_t(valid) * plan.staged_pitch, 0, sizeof(T) * lacking * size_t(plan.staged_pitch));
  for (int run = 0; run < runs.count; ++run) {
    const E *s = student.data + run * student.c, *t = teacher.data + run * teacher.c;
    T* to = staged + int64_t(run) * plan.staged_pitch;
    for (int64_t i = 0; i < runs.length; i += n) {
      const int64_t at = i < runs.length - n ? i : runs.length - n;  // the last vector may overlap the one before
      store_as<T>(to + at, difference ? load_as<T>(s + at) - load_as<T>(t + at) : load_as<T>(s + at));
    }
  }
}

template <typename T, typename E>
static void unstage(const Plan<T>& plan, const T* staged, Runs runs, const View<E>& gradient, bool streaming) {
  constexpr int n = lanes<T>;
  for (int run = 0; run < runs.count; ++run) {
    const T* from = staged + int64_t(run) * plan.staged_pitch;
    E* to = gradient.data + run * gradient.c;
    int64_t i = 0;
    if constexpr (std::is_same_v<T, E>) {
      if (streaming) {
        store_as<T>(to, load_as<T>(from));
        i = int64_t(-reinterpret_cast<uintptr_t>(to) % vector_bytes / sizeof(T));
        for (; i + n <= runs.length; i += n) stream(to + i, load_as<T>(from + i));
      }
    }
    for (; i < runs.length; i += n) {
      const int64_t at = i < runs.length - n ? i : runs.length - n;
      store_as<T>(to + at, load_as<T>(from + at));
    }
  }
}

// Pixels [begin, end) between `staged` and the plane, at least lanes<T> of them; the last two squares may overlap.
template <typename T>
static void load_squares(const Plan<T>& plan, const T* staged, int begin, int end, Complex<T>* plane) {
  constexpr int n = lanes<T>;
  for (int pixel = begin; pixel < end; pixel += n) {
    const int first = pixel < end - n ? pixel : end - n;
    for (int part = 0; part < 2; ++part) {
      Vec<T> square[n];
      ADD_OPS_UNROLL
      for (int i = 0; i < n; ++i) square[i] = load_as<T>(staged + (part * n + i) * plan.staged_pitch + first);
      transpose<T>(square);
      ADD_OPS_UNROLL
      for (int i = 0; i < n; ++i) (&plane[plan.slot_of_pixel[first + i]].re)[part] = square[i];
    }
  }
}
template <typename T>
static void store_squares(const Plan<T>& plan, const Complex<T>* plane, int begin, int end, T* staged) {
  constexpr int n = lanes<T>;
  for (int pixel = begin; pixel < end; pixel += n) {
    const int first = pixel < end - n ? pixel : end - n;
    for (int part = 0; part < 2; ++part) {
      Vec<T> square[n];
      ADD_OPS_UNROLL
      for (int i = 0; i < n; ++i) square[i] = (&plane[plan.slot_of_pixel[first + i]].re)[part];
      transpose<T>(square);
      ADD_OPS_UNROLL
      for (int i = 0; i < n; ++i) store_as<T>(staged + (part * n + i) * plan.staged_pitch + first, square[i]);
    }
  }
}

// The same for any strides, and from or to the maps themselves. `end - begin` is a number of whole rows.
template <typename T, typename E, bool difference>
static void load_pixels(const Plan<T>& plan, const View<E>& student, const View<E>& teacher, int valid, int begin,
                        int end, Complex<T>* plane) {
  constexpr int n = lanes<T>;
  const bool in_place = student.c == 1 && (!difference || teacher.c == 1) && valid == 2 * n;
  const auto vector = [&](const E* s, const E* t) __attribute__((always_inline)) {
    return difference ? load_as<T>(s) - load_as<T>(t) : load_as<T>(s);
  };
  E s[2 * n] = {}, t[2 * n] = {};
  for (int pixel = begin, row = begin / plan.width; pixel < end; ++row) {
    for (int column = 0; column < plan.width; ++column, ++pixel) {
      const E *from = student.data + row * student.h + column * student.w,
              *minus = teacher.data + row * teacher.h + column * teacher.w;
      if (!in_place) {
        for (int c = 0; c < valid; ++c) s[c] = from[c * student.c];
        if (difference)
          for (int c = 0; c < valid; ++c) t[c] = minus[c * teacher.c];
        from = s, minus = t;
      }
      plane[plan.slot_of_pixel[pixel]] = {vector(from, minus), vector(from + n, minus + n)};
    }
  }
}
template <typename T, typename E>
static void store_pixels(const Plan<T>& plan, const Complex<T>* plane, int valid, int begin, int end,
                         const View<E>& gradient) {
  constexpr int n = lanes<T>;
  const bool in_place = gradient.c == 1 && valid == 2 * n;
  E g[2 * n];
  for (int pixel = begin, row = begin / plan.width; pixel < end; ++row) {
    for (int column = 0; column < plan.width; ++column, ++pixel) {
      E* to = gradient.data + row * gradient.h + column * gradient.w;
      const Complex<T>& value = plane[plan.slot_of_pixel[pixel]];
      store_as<T>(in_place ? to : g, value.re);
      store_as<T>(in_place ? to + n : g + n, value.im);
      if (!in_place)
        for (int c = 0; c < valid; ++c) to[c * gradient.c] = g[c];
    }
  }
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
