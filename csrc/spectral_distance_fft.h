// In-place complex DFTs of lanes<T> channel pairs side by side: every lane is a transform of its own, so the code below
// is scalar code on vectors. Plans (which radices, where things stand) come from spectral_distance_plan.h.
#pragma once

#include "simd.h"
#include "spectral_distance.h"

namespace add_ops {
namespace ADD_OPS_ISA {

// One complex number per lane; in memory also 2·lanes consecutive channels.
template <typename T>
struct Complex {
  Vec<T> re, im;
};
template <typename T>
ADD_OPS_INLINE Complex<T> operator+(const Complex<T>& a, const Complex<T>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <typename T>
ADD_OPS_INLINE Complex<T> operator-(const Complex<T>& a, const Complex<T>& b) {
  return {a.re - b.re, a.im - b.im};
}
template <typename T>
ADD_OPS_INLINE Complex<T> times(const Complex<T>& a, T cosine, T sine) {
  return {a.re * cosine - a.im * sine, a.im * cosine + a.re * sine};
}

// cos(2πk/R), then sin(2πk/R), for k = 1, 2, …
template <int R>
constexpr double roots[] = {1.0, 0.0};
template <>
constexpr double roots<3>[] = {-0.5, 0.86602540378443864676};
template <>
constexpr double roots<5>[] = {0.30901699437494742410, -0.80901699437494742410, 0.95105651629515357212,
                               0.58778525229247312917};
template <>
constexpr double roots<7>[] = {0.62348980185873353053, -0.22252093395631440429, -0.90096886790241912624,
                               0.78183148246802980871, 0.97492791218182360702,  0.43388373911755812048};
template <>
constexpr double roots<8>[] = {0.70710678118654752440, 0.0, -0.70710678118654752440,
                               0.70710678118654752440, 1.0, 0.70710678118654752440};
template <>
constexpr double roots<16>[] = {0.92387953251128675613,  0.70710678118654752440,  0.38268343236508977173,
                                0.00000000000000000000,  -0.38268343236508977173, -0.70710678118654752440,
                                -0.92387953251128675613, 0.38268343236508977173,  0.70710678118654752440,
                                0.92387953251128675613,  1.00000000000000000000,  0.92387953251128675613,
                                0.70710678118654752440,  0.38268343236508977173};

// The DFT of R points in registers, natural order. Odd R: with s_j = x_j + x_{R-j} and d_j = x_j - x_{R-j},
// X_{±k} = x_0 + Σ_j s_j·cos(2πjk/R) ∓ i·Σ_j d_j·sin(2πjk/R). Even R: two halves and one radix-2 step.
template <typename T, int R>
ADD_OPS_INLINE void codelet(Complex<T> (&x)[R]) {
  if constexpr (R == 2) {
    const Complex<T> a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  } else if constexpr (R == 4) {
    const Complex<T> a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
    x[0] = a + c, x[2] = a - c;
    x[1] = {b.re + d.im, b.im - d.re}, x[3] = {b.re - d.im, b.im + d.re};
  } else if constexpr (R % 2 == 0) {
    Complex<T> even[R / 2], odd[R / 2];
    ADD_OPS_UNROLL
    for (int j = 0; j < R / 2; ++j) even[j] = x[2 * j], odd[j] = x[2 * j + 1];
    codelet<T, R / 2>(even);
    codelet<T, R / 2>(odd);
    ADD_OPS_UNROLL
    for (int k = 0; k < R / 2; ++k) {
      if (k == R / 4)
        odd[k] = {odd[k].im, -odd[k].re};
      else if (k > 0)
        odd[k] = times<T>(odd[k], T(roots<R>[k - 1]), T(-roots<R>[R / 2 - 2 + k]));
      x[k] = even[k] + odd[k], x[k + R / 2] = even[k] - odd[k];
    }
  } else {
    constexpr int half = R / 2;
    const Complex<T> x0 = x[0];
    Complex<T> s[half], d[half];
    ADD_OPS_UNROLL
    for (int j = 0; j < half; ++j) {
      s[j] = x[j + 1] + x[R - 1 - j], d[j] = x[j + 1] - x[R - 1 - j];
      x[0] = x[0] + s[j];
    }
    ADD_OPS_UNROLL
    for (int k = 1; k <= half; ++k) {
      Complex<T> a = x0, b = {};
      ADD_OPS_UNROLL
      for (int j = 1; j <= half; ++j) {
        const int turn = j * k % R, near = turn > half ? R - turn : turn;
        const T cosine = T(roots<R>[near - 1]),
                sine = T(turn > half ? -roots<R>[half + near - 1] : roots<R>[half + near - 1]);
        a.re += s[j - 1].re * cosine, a.im += s[j - 1].im * cosine;
        b.re += d[j - 1].re * sine, b.im += d[j - 1].im * sine;
      }
      x[k] = {a.re + b.im, a.im - b.re}, x[R - k] = {a.re - b.im, a.im + b.re};
    }
  }
}

// The inverse transform is the transposed network (stages backwards, twiddles before the butterflies) on numbers whose
// real and imaginary parts have changed places. It takes the order that the forward transform leaves, and leaves the
// one that it takes.
template <bool inverse, typename T>
ADD_OPS_INLINE Complex<T> fetch(const Complex<T>& from) {
  return {inverse ? from.im : from.re, inverse ? from.re : from.im};
}
template <bool inverse, typename T>
ADD_OPS_INLINE void put(Complex<T>& to, const Complex<T>& value) {
  to.re = inverse ? value.im : value.re, to.im = inverse ? value.re : value.im;
}

// `count` butterflies, `next` slots apart; each takes the twiddles `next_twiddle` behind those of the one before.
template <typename T, int R, bool inverse, bool twiddled>
void butterflies(Complex<T>* at, int64_t apart, int count, int64_t next, const T* twiddle, int64_t next_twiddle) {
  for (int i = 0; i < count; ++i, at += next, twiddle += next_twiddle) {
    Complex<T> x[R];
    ADD_OPS_UNROLL
    for (int q = 0; q < R; ++q) {
      x[q] = fetch<inverse>(at[q * apart]);
      if (inverse && twiddled && q > 0) x[q] = times<T>(x[q], twiddle[2 * q - 2], twiddle[2 * q - 1]);
    }
    codelet<T, R>(x);
    ADD_OPS_UNROLL
    for (int q = 0; q < R; ++q) {
      if (!inverse && twiddled && q > 0) x[q] = times<T>(x[q], twiddle[2 * q - 2], twiddle[2 * q - 1]);
      put<inverse>(at[q * apart], x[q]);
    }
  }
}

// The innermost loop runs over the lines if there are several, else over the longer of the two loops within the line.
template <typename T, bool inverse, int R>
void codelet_stage(const Stage<T>& stage, Complex<T>* line, int64_t step, int lines, int64_t next) {
  const int64_t apart = stage.rest * step;
  const auto run = stage.twiddles ? butterflies<T, R, inverse, true> : butterflies<T, R, inverse, false>;
  if (lines == 1 && stage.rest == 1) return run(line, apart, stage.blocks, R * apart, stage.twiddles, 0);
  for (int block = 0; block < stage.blocks; ++block, line += R * apart) {
    if (lines == 1) {
      run(line, apart, stage.rest, step, stage.twiddles, 2 * R - 2);
      continue;
    }
    for (int j = 0; j < stage.rest; ++j)
      run(line + j * step, apart, lines, next, stage.twiddles + (stage.twiddles ? j * (2 * R - 2) : 0), 0);
  }
}

// Any odd radix: the formula of the odd codelets with its sums over j as matrix products, `rows` rows at a time.
template <typename T, int rows>
ADD_OPS_INLINE void multiply(const T* matrix, int half, const Complex<T>* x, Complex<T> (&sums)[rows]) {
  for (int j = 0; j < half; ++j) {
    ADD_OPS_UNROLL
    for (int k = 0; k < rows; ++k) {
      const T factor = matrix[k * half + j];
      sums[k].re += x[j].re * factor, sums[k].im += x[j].im * factor;
    }
  }
}

template <typename T, bool inverse>
void matrix_stage(const Stage<T>& stage, Complex<T>* line, int64_t step, Complex<T>* scratch) {
  const int radix = stage.radix, half = radix / 2;
  const int64_t apart = stage.rest * step;
  Complex<T>*s = scratch, *d = scratch + half;
  for (int block = 0; block < stage.blocks; ++block, line += radix * apart) {
    for (int j = 0; j < stage.rest; ++j) {
      Complex<T>* at = line + j * step;
      const T* twiddle = stage.twiddles ? stage.twiddles + j * (2 * radix - 2) : nullptr;
      const auto get = [&](int q) __attribute__((always_inline)) {
        Complex<T> x = fetch<inverse>(at[q * apart]);
        if (inverse && twiddle) x = times<T>(x, twiddle[2 * q - 2], twiddle[2 * q - 1]);
        return x;
      };
      const auto set = [&](int q, Complex<T> x) __attribute__((always_inline)) {
        if (!inverse && twiddle) x = times<T>(x, twiddle[2 * q - 2], twiddle[2 * q - 1]);
        put<inverse>(at[q * apart], x);
      };
      const Complex<T> x0 = fetch<inverse>(at[0]);
      Complex<T> sum = x0;
      for (int q = 1; q <= half; ++q) {
        const Complex<T> a = get(q), b = get(radix - q);
        s[q - 1] = a + b, d[q - 1] = a - b;
        sum = sum + s[q - 1];
      }
      put<inverse>(at[0], sum);
      const auto outputs = [&](int first, auto& a, auto& b) __attribute__((always_inline)) {
        constexpr int rows = sizeof(a) / sizeof(a[0]);
        multiply<T, rows>(stage.matrix + int64_t(first) * half, half, s, a);
        multiply<T, rows>(stage.matrix + int64_t(first + half) * half, half, d, b);
        ADD_OPS_UNROLL
        for (int k = 0; k < rows; ++k) {
          set(first + k + 1, {a[k].re + b[k].im, a[k].im - b[k].re});
          set(radix - 1 - first - k, {a[k].re - b[k].im, a[k].im + b[k].re});
        }
      };
      int k = 0;
      for (; k + 5 <= half; k += 5) {
        Complex<T> a[5] = {x0, x0, x0, x0, x0}, b[5] = {};
        outputs(k, a, b);
      }
      for (; k + 2 <= half; k += 2) {
        Complex<T> a[2] = {x0, x0}, b[2] = {};
        outputs(k, a, b);
      }
      if (k < half) {
        Complex<T> a[1] = {x0}, b[1] = {};
        outputs(k, a, b);
      }
    }
  }
}

// Transforms `lines` lines that stand `next` slots apart, the points of a line `step` slots apart. `scratch` holds as
// many numbers as the axis is long.
template <bool inverse, typename T>
void transform(const Axis<T>& axis, Complex<T>* line, int64_t step, int lines, int64_t next, Complex<T>* scratch) {
  for (int index = 0; index < axis.stages; ++index) {
    const Stage<T>& stage = axis.stage[inverse ? axis.stages - 1 - index : index];
    switch (stage.matrix ? 0 : stage.radix) {
      case 2: codelet_stage<T, inverse, 2>(stage, line, step, lines, next); break;
      case 3: codelet_stage<T, inverse, 3>(stage, line, step, lines, next); break;
      case 4: codelet_stage<T, inverse, 4>(stage, line, step, lines, next); break;
      case 5: codelet_stage<T, inverse, 5>(stage, line, step, lines, next); break;
      case 7: codelet_stage<T, inverse, 7>(stage, line, step, lines, next); break;
      case 8: codelet_stage<T, inverse, 8>(stage, line, step, lines, next); break;
      case 16: codelet_stage<T, inverse, 16>(stage, line, step, lines, next); break;
      default:
        for (int i = 0; i < lines; ++i) matrix_stage<T, inverse>(stage, line + i * next, step, scratch);
    }
  }
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
