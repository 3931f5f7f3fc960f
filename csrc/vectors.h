// Fixed-width vectors in plain GCC/clang vector extensions, for kernel files only: everything is internal to the file that
// includes it, so the copies of a kernel share no code. Element types are read and written as float or double lanes.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "dispatch.h"
#ifdef ADD_OPS_X86
#include <immintrin.h>
#endif

#define ADD_OPS_INLINE static inline __attribute__((always_inline))

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecH __attribute__((vector_size(kVectorBytes / 2)));
typedef float VecN __attribute__((vector_size(kVectorBytes / 2)));  // as many floats as VecD has doubles

template <typename Vec, typename Pointer>
ADD_OPS_INLINE Vec load_bits(const Pointer* source) {
  Vec value;
  std::memcpy(&value, source, sizeof value);
  return value;
}
template <typename Vec, typename Pointer>
ADD_OPS_INLINE void store_bits(Pointer* target, Vec value) {
  std::memcpy(target, &value, sizeof value);
}
template <typename To, typename From>
ADD_OPS_INLINE To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
// One bit per lane of a comparison's result.
ADD_OPS_INLINE uint32_t lane_bits(VecU mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps((__m128)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kVectorBytes / 4; ++i) bits |= (mask[i] & 1) << i;
  return bits;
#endif
}
ADD_OPS_INLINE VecU select(VecU mask, VecU yes, VecU no) { return (mask & yes) | (~mask & no); }

// Storage types. Acc is the type of the arithmetic, Vec its vector, Bits the integer that holds a 16-bit float.
struct Float32 { using Store = float; using Acc = float; using Vec = VecF; };
struct Float64 { using Store = double; using Acc = double; using Vec = VecD; };
struct Float16 { using Store = uint16_t; using Acc = float; using Vec = VecF; };
struct BFloat16 { using Store = uint16_t; using Acc = float; using Vec = VecF; };

ADD_OPS_INLINE VecF load(Float32, const float* p) { return load_bits<VecF>(p); }
ADD_OPS_INLINE VecD load(Float64, const double* p) { return load_bits<VecD>(p); }
ADD_OPS_INLINE VecF load(BFloat16, const uint16_t* p) {
  return bit_cast<VecF>(__builtin_convertvector(load_bits<VecH>(p), VecU) << 16);
}
ADD_OPS_INLINE VecF load(Float16, const uint16_t* p) {
  const VecU half = __builtin_convertvector(load_bits<VecH>(p), VecU);
  const VecU magnitude = (half & 0x7fff) << 13;
  const VecU infinite = (VecU)(magnitude >= 0x0f800000) & 0x7f800000;
  const VecF scaled = bit_cast<VecF>(magnitude) * 0x1p112f;  // rebiases the exponent; exact, subnormals included
  return bit_cast<VecF>(bit_cast<VecU>(scaled) | infinite | (half & 0x8000) << 16);
}

ADD_OPS_INLINE void store(Float32, float* p, VecF value) { store_bits(p, value); }
ADD_OPS_INLINE void store(Float64, double* p, VecD value) { store_bits(p, value); }
ADD_OPS_INLINE void store(BFloat16, uint16_t* p, VecF value) {
  const VecU bits = bit_cast<VecU>(value);
  const VecU rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const VecU nan = (VecU)((bits & 0x7fffffff) > 0x7f800000);
  store_bits(p, __builtin_convertvector(select(nan, bits >> 16 | 0x40, rounded), VecH));
}
ADD_OPS_INLINE void store(Float16, uint16_t* p, VecF value) {  // round to nearest, ties to even
  const VecU bits = bit_cast<VecU>(value), magnitude = bits & 0x7fffffff;
  const VecU normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const VecU tiny = bit_cast<VecU>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000;  // the sum rounds at the last half bit
  const VecU special = select((VecU)(magnitude > 0x7f800000), VecU{} + 0x7e00, VecU{} + 0x7c00);
  VecU half = select((VecU)(magnitude < 0x38800000), tiny, normal);
  half = select((VecU)(magnitude >= 0x477ff000), special, half);
  store_bits(p, __builtin_convertvector(half | (bits >> 16 & 0x8000), VecH));
}

// A store that leaves no copy in the caches, for arrays that outgrow them; `p` is aligned to a vector. Call end_stream
// before other threads read what was stored.
template <typename Type>
ADD_OPS_INLINE void stream(Type type, typename Type::Store* p, typename Type::Vec value) {
  store(type, p, value);
}
#ifdef ADD_OPS_X86
ADD_OPS_INLINE void stream(Float32, float* p, VecF value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, value);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, value);
#else
  _mm_stream_ps(p, value);
#endif
}
ADD_OPS_INLINE void end_stream() { _mm_sfence(); }
#else
ADD_OPS_INLINE void end_stream() {}
#endif

// One element at a time, through the same conversions.
template <typename Type>
ADD_OPS_INLINE typename Type::Acc load_one(Type type, const typename Type::Store* p) {
  typename Type::Store padded[sizeof(typename Type::Vec) / sizeof(typename Type::Acc)] = {*p};
  return load(type, padded)[0];
}
template <typename Type>
ADD_OPS_INLINE void store_one(Type type, typename Type::Store* p, typename Type::Acc value) {
  typename Type::Store padded[sizeof(typename Type::Vec) / sizeof(typename Type::Acc)];
  store(type, padded, typename Type::Vec{} + value);
  *p = padded[0];
}

// Transposes a square of vectors in registers: at each step, blocks of `Step` lanes swap across the diagonal.
template <int Step, typename Vec, int... I>
ADD_OPS_INLINE void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, I...>) {
  constexpr int width = sizeof...(I);
  const Vec upper = __builtin_shufflevector(a, b, (I & Step ? width + I - Step : I)...);
  b = __builtin_shufflevector(a, b, (I & Step ? width + I : I + Step)...);
  a = upper;
}
template <int Step, int Width, typename Vec>
ADD_OPS_INLINE void transpose(Vec (&rows)[Width]) {
  if constexpr (Step < Width) {
#pragma GCC unroll 16
    for (int i = 0; i < Width; ++i)
      if (!(i & Step)) swap_blocks<Step>(rows[i], rows[i + Step], std::make_integer_sequence<int, Width>());
    transpose<2 * Step>(rows);
  }
}

}  // namespace
}  // namespace ADD_OPS_ISA
}  // namespace add_ops
