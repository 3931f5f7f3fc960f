// Vectors for the kernels: GCC/clang vector extensions, as wide as the instruction set at hand.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define ADD_OPS_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define ADD_OPS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ADD_OPS_UNROLL _Pragma("GCC unroll 64")
#endif

namespace add_ops {
namespace ADD_OPS_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <typename T, int N>
using Vector = typename VectorOf<T, N>::type;
template <typename T>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));
template <typename T>
using Vec = Vector<T, lanes<T>>;

template <typename To, typename From>
ADD_OPS_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename V>
ADD_OPS_INLINE V load(const void* address) {
  V v;
  std::memcpy(&v, address, sizeof v);
  return v;
}

template <typename V>
ADD_OPS_INLINE void store(void* address, const V& v) {
  std::memcpy(address, &v, sizeof v);
}

// One bit per lane of a comparison's result.
using Mask = Vector<uint32_t, vector_bytes / 4>;
ADD_OPS_INLINE uint32_t lane_bits(const Mask& mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bits_as<__m512i>(mask));
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(bits_as<__m256>(mask)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(bits_as<__m128>(mask)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < vector_bytes / 4; ++i) bits |= (mask[i] & 1) << i;
  return bits;
#endif
}

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

// load_as<T>(address): lanes<T> consecutive elements, widened to T.
template <typename T>
ADD_OPS_INLINE Vec<T> load_as(const T* p) {
  return load<Vec<T>>(p);
}
template <typename T>
ADD_OPS_INLINE Vec<T> load_as(const Bfloat* p) {
  constexpr int N = lanes<T>;
  const auto wide = __builtin_convertvector(load<Vector<uint16_t, N>>(p), Vector<uint32_t, N>) << 16;
  return __builtin_convertvector(bits_as<Vector<float, N>>(wide), Vec<T>);
}
template <typename T>
ADD_OPS_INLINE Vec<T> load_as(const Half* p) {
  constexpr int N = lanes<T>;
  using U = Vector<uint32_t, N>;
  const U half = __builtin_convertvector(load<Vector<uint16_t, N>>(p), U);
  const U magnitude = (half & 0x7fff) << 13;  // a float with an exponent that is 112 too small, subnormals included
  const U special = U(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
  const U scaled = bits_as<U>(bits_as<Vector<float, N>>(magnitude) * 0x1p112f);
  return __builtin_convertvector(bits_as<Vector<float, N>>(scaled | special | ((half & 0x8000) << 16)), Vec<T>);
}
template <typename T, typename = std::enable_if_t<sizeof(T) == 8>>
ADD_OPS_INLINE Vec<T> load_as(const float* p) {
  return __builtin_convertvector(load<Vector<float, lanes<T>>>(p), Vec<T>);
}

// store_as<T>(address, v): the reverse, rounding to nearest, ties to even.
template <typename T>
ADD_OPS_INLINE void store_as(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
template <typename T>
ADD_OPS_INLINE void store_as(Bfloat* p, Vec<T> v) {
  constexpr int N = lanes<T>;
  using U = Vector<uint32_t, N>;
  const U u = bits_as<U>(__builtin_convertvector(v, Vector<float, N>));
  const U nan = U((u & 0x7fffffff) > 0x7f800000u);
  const U rounded = (nan & 0x7fc0) | (~nan & ((u + 0x7fff + ((u >> 16) & 1)) >> 16));
  const auto narrow = __builtin_convertvector(rounded, Vector<uint16_t, N>);
  std::memcpy(p, &narrow, sizeof narrow);
}
template <typename T>
ADD_OPS_INLINE void store_as(Half* p, Vec<T> v) {
  constexpr int N = lanes<T>;
  using U = Vector<uint32_t, N>;
  const U bits = bits_as<U>(__builtin_convertvector(v, Vector<float, N>)), u = bits & 0x7fffffff;
  const U large = U(u >= (143u << 23)), nan = U(u > 0x7f800000u), subnormal = U(u < (113u << 23));
  const U normal = (u + 0xfff + ((u >> 13) & 1) - (112u << 23)) >> 13;
  const U tiny = bits_as<U>(bits_as<Vector<float, N>>(u) + 0.5f) - (126u << 23);  // the addition rounds to 2⁻²⁴
  const U finite = (subnormal & tiny) | (~subnormal & normal);
  const U half = (large & (0x7c00 | (nan & 0x200))) | (~large & finite) | ((bits >> 16) & 0x8000);
  const auto narrow = __builtin_convertvector(half, Vector<uint16_t, N>);
  std::memcpy(p, &narrow, sizeof narrow);
}
template <typename T, typename = std::enable_if_t<sizeof(T) == 8>>
ADD_OPS_INLINE void store_as(float* p, Vec<T> v) {
  const auto narrow = __builtin_convertvector(v, Vector<float, lanes<T>>);
  std::memcpy(p, &narrow, sizeof narrow);
}

// Writes a whole vector to an aligned address around the caches, where the machine can; `fence_streams` makes such
// writes visible to other threads.
template <typename V>
ADD_OPS_INLINE void stream(void* p, V v) {
#ifdef __AVX512F__
  _mm512_stream_si512(static_cast<__m512i*>(p), bits_as<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), bits_as<__m256i>(v));
#elif defined(__SSE2__)
  _mm_stream_si128(static_cast<__m128i*>(p), bits_as<__m128i>(v));
#else
  std::memcpy(p, &v, sizeof v);
#endif
}
ADD_OPS_INLINE void fence_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// exp(x) = scale·(1 + m1), m1 = exp(r) - 1 of the rest r in ±ln(2)/2, for x in (-inf, 0]; exp(x) - 1 keeps its relative
// accuracy as scale·m1 + (scale - 1).
template <typename T>
struct Exponential {
  Vec<T> scale, m1;
};
template <typename T>
ADD_OPS_INLINE Exponential<T> exponential(Vec<T> x) {
  constexpr bool wide = sizeof(T) == 8;
  using U = Vector<std::conditional_t<wide, uint64_t, uint32_t>, lanes<T>>;
  constexpr T lowest = wide ? -708 : -87, magic = wide ? T(0x1.8p52) : T(0x1.8p23);
  constexpr T ln2_high = wide ? T(0x1.62e42feep-1) : T(0x1.62ep-1);
  constexpr T ln2_low = wide ? T(0x1.a39ef35793c76p-33) : T(0x1.0bfbe8p-15);
  x = x < lowest ? Vec<T>{} + lowest : x;
  const Vec<T> shifted = x * T(1.4426950408889634) + magic;  // its low bits are the rounded quotient
  const Vec<T> n = shifted - magic, r = (x - n * ln2_high) - n * ln2_low;
  Vec<T> m1 = Vec<T>{} + T(1);
  for (int k = wide ? 14 : 8; k > 1; --k) m1 = T(1) + m1 * r * (T(1) / T(k));
  const U scale = (bits_as<U>(shifted) << (wide ? 52 : 23)) + bits_as<U>(Vec<T>{} + T(1));
  return {bits_as<Vec<T>>(scale), m1 * r};
}

// The four ways to pick half of the lanes of two vectors that a transposition needs: pairs of elements (`unpack`) or of
// halves within each 128 bits, halves or alternate 128-bit blocks of the whole vector. All are single instructions.
enum class Pick { unpack, half, vector_half, block };
template <typename T, Pick kind, bool high>
constexpr int picked(int i) {
  constexpr int n = lanes<T>, e = 16 / sizeof(T);
  const int block = i / e, in = i % e;
  if (kind == Pick::unpack) return block * e + (high ? e / 2 : 0) + in / 2 + (in % 2) * n;
  if (kind == Pick::half) return block * e + (high ? e / 2 : 0) + in % (e / 2) + (in / (e / 2)) * n;
  if (kind == Pick::vector_half) return (high ? n / 2 : 0) + i % (n / 2) + (i / (n / 2)) * n;
  return (2 * block + high) * e % n + in + (2 * block * e / n) * n;
}
template <typename T, Pick kind, bool high, int... I>
ADD_OPS_INLINE Vec<T> pick(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, picked<T, kind, high>(I)...);
}
template <typename T, Pick kind>
ADD_OPS_INLINE void pick_both(Vec<T>& a, Vec<T>& b) {
  constexpr auto all = std::make_integer_sequence<int, lanes<T>>();
  const Vec<T> low = pick<T, kind, false>(a, b, all), high = pick<T, kind, true>(a, b, all);
  a = low, b = high;
}

template <typename V>
ADD_OPS_INLINE void exchange(V& a, V& b) {
  const V old = a;
  a = b, b = old;
}

// Transposes a lanes × lanes square in registers: first inside each 128 bits, then the 128-bit blocks.
template <typename T>
ADD_OPS_INLINE void transpose(Vec<T> (&r)[lanes<T>]) {
  constexpr int n = lanes<T>, e = 16 / sizeof(T), blocks = n / e;
  ADD_OPS_UNROLL
  for (int i = 0; i < n; i += 2) pick_both<T, Pick::unpack>(r[i], r[i + 1]);
  if constexpr (e == 4) {
    ADD_OPS_UNROLL
    for (int i = 0; i < n; i += 4) {
      pick_both<T, Pick::half>(r[i], r[i + 2]);
      pick_both<T, Pick::half>(r[i + 1], r[i + 3]);
      exchange(r[i + 1], r[i + 2]);
    }
  }
  if constexpr (blocks == 2) {
    ADD_OPS_UNROLL
    for (int i = 0; i < e; ++i) pick_both<T, Pick::vector_half>(r[i], r[i + e]);
  }
  if constexpr (blocks == 4) {
    ADD_OPS_UNROLL
    for (int i = 0; i < e; ++i) {
      pick_both<T, Pick::vector_half>(r[i], r[i + e]);
      pick_both<T, Pick::vector_half>(r[i + 2 * e], r[i + 3 * e]);
      pick_both<T, Pick::block>(r[i], r[i + 2 * e]);
      pick_both<T, Pick::block>(r[i + e], r[i + 3 * e]);
      exchange(r[i + e], r[i + 2 * e]);
    }
  }
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
