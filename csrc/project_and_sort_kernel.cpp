// The key-index sort of project_and_sort. Compiled once per instruction set.
#include "project_and_sort.h"

#include <cstring>
#include <type_traits>

#include "simd.h"

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

constexpr int kRankSort = 128;  // up to so many values, counting the smaller ones is faster than a radix sort

constexpr int kWideDigits = 2048;  // from so many values on, fewer and wider digits win over smaller tables

template <typename Float>
using KeyOf = std::conditional_t<sizeof(Float) == 8, uint64_t, uint32_t>;

// Floats in order are unsigned integers in order once negative ones are inverted. -0 becomes +0, and every NaN the
// largest key.
template <typename Float>
inline KeyOf<Float> to_key(Float value) {
  using Key = KeyOf<Float>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  const Float positive_zero = value + Float{0};
  Key bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  bits = bits & sign ? ~bits : bits | sign;
  return value == value ? bits : ~Key{0};
}

template <typename Float>
inline Float from_key(KeyOf<Float> key) {
  using Key = KeyOf<Float>;
  constexpr Key sign = Key{1} << (8 * sizeof(Key) - 1);
  const Key bits = key & sign ? key & ~sign : ~key;
  Float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Each value's place in the sorted row is the number of smaller ones. False, with nothing changed, if two are equal.
template <typename Float, typename Index>
bool rank_sort(int n, Float* values, Index* index) {
  using Key = KeyOf<Float>;
  using Order = std::make_signed_t<Key>;  // signed comparison is the one that vector units have
  constexpr Key flip = Key{1} << (8 * sizeof(Key) - 1);
  Order keys[kRankSort], rank[kRankSort] = {};
  for (int i = 0; i < n; ++i) keys[i] = static_cast<Order>(to_key(values[i]) ^ flip);
  const int padded = (n + 15) / 16 * 16;
  for (int i = n; i < padded; ++i) keys[i] = 0;
  for (int j = 0; j < n; ++j) {
    const Order key = keys[j];
    for (int i = 0; i < padded; ++i) rank[i] += key < keys[i];
  }
  Order sum = 0;
  for (int i = 0; i < n; ++i) sum += rank[i];
  if (sum != n * (n - 1) / 2) return false;
  for (int i = 0; i < n; ++i) {
    values[rank[i]] = from_key<Float>(static_cast<Key>(keys[i]) ^ flip);
    index[rank[i]] = static_cast<Index>(i);
  }
  return true;
}

// Least significant digit first; a digit that all keys share is skipped.
template <int Bits, typename Float, typename Index>
void radix_sort(int64_t n, Float* values, Index* index, Keyed<KeyOf<Float>>* from, Keyed<KeyOf<Float>>* to) {
  using Key = KeyOf<Float>;
  constexpr int digits = (8 * sizeof(Key) + Bits - 1) / Bits, size = 1 << Bits;
  int32_t count[digits][size] = {};
  for (int64_t i = 0; i < n; ++i) {
    const Key key = to_key(values[i]);
    from[i].key = key;
    from[i].place = static_cast<int32_t>(i);
    for (int d = 0; d < digits; ++d) ++count[d][key >> (Bits * d) & (size - 1)];
  }
  for (int d = 0; d < digits; ++d) {
    int32_t* next = count[d];
    if (next[from[0].key >> (Bits * d) & (size - 1)] == n) continue;
    int32_t sum = 0;
    for (int digit = 0; digit < size; ++digit) {
      const int32_t here = next[digit];
      next[digit] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < n; ++i) to[next[from[i].key >> (Bits * d) & (size - 1)]++] = from[i];
    auto* swap = from;
    from = to;
    to = swap;
  }
  for (int64_t i = 0; i < n; ++i) {
    values[i] = from_key<Float>(from[i].key);
    index[i] = static_cast<Index>(from[i].place);
  }
}

#if defined(__AVX512F__)
constexpr int kNetwork = kNetworkMost;  // above, a radix sort takes fewer steps
#elif defined(__AVX2__)
constexpr int kNetwork = 256;
#else
constexpr int kNetwork = 0;  // no comparison of 64-bit integers
#endif
// Of as many rows: a float's key above its place, all different, so that any sort is stable.
using Packed = Vec<int64_t>;
constexpr int kRows = lanes<int64_t>;
using Floats = Vector<float, kRows>;
using Keys = Vector<int32_t, kRows>;

ADD_OPS_INLINE Packed pack(const float* values, int64_t first) {
  const Floats value = load<Floats>(values);
  Keys key = bits_as<Keys>(value + 0.0f);
  key ^= (key >> 31) & 0x7fffffff;  // ascends as the float does
  key = value == value ? key : Keys{} + 0x7fffffff;
  Packed place;
  for (int i = 0; i < kRows; ++i) place[i] = first + i;
  return __builtin_convertvector(key, Packed) << 32 | place;
}

template <typename Index>
ADD_OPS_INLINE void unpack(const Packed& packed, float* values, Index* index) {
  Keys key = __builtin_convertvector(packed >> 32, Keys);
  key ^= (key >> 31) & 0x7fffffff;
  store(values, key);
  store(index, __builtin_convertvector(packed & 0x7fffffff, Vector<Index, kRows>));
}

// Batcher's merge exchange for any n (Knuth, The Art of Computer Programming, 5.2.2 M): rows side by side in the lanes,
// so that every comparison serves all of them.
void merge_exchange(int64_t n, char* columns) {
  constexpr int64_t size = sizeof(Packed);
  int64_t top = 1;
  while (2 * top < n) top *= 2;
  for (int64_t p = top; p > 0; p /= 2)
    for (int64_t q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int64_t run = r; run < n - d; run += 2 * p) {
        const int64_t end = run + p < n - d ? run + p : n - d;
        for (int64_t i = run; i < end; ++i) {
          const Packed a = load<Packed>(columns + i * size), b = load<Packed>(columns + (i + d) * size);
          store(columns + i * size, a < b ? a : b);
          store(columns + (i + d) * size, a < b ? b : a);
        }
      }
      if (q == p) break;
    }
}

// Sorts kRows rows, of which the last `missing` are not there.
template <typename Index>
void network_sort(int64_t n, int missing, float* values, Index* index, char* scratch) {
  char* columns = scratch + (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
  const int rows = kRows - missing;
  float few[kRows];
  Index places[kRows];
  for (int64_t first = 0; first < n; first += kRows) {
    const bool whole = first + kRows <= n;
    Packed square[kRows];
    for (int row = 0; row < kRows; ++row) {
      const float* from = values + (row < rows ? row : 0) * n + first;
      if (!whole) std::memcpy(few, from, (n - first) * sizeof(float));
      square[row] = pack(whole ? from : few, first);
    }
    transpose<int64_t>(square);
    for (int column = 0; column < kRows; ++column) store(columns + (first + column) * sizeof(Packed), square[column]);
  }
  merge_exchange(n, columns);
  for (int64_t first = 0; first < n; first += kRows) {
    Packed square[kRows];
    for (int column = 0; column < kRows; ++column)
      square[column] = load<Packed>(columns + (first + column) * sizeof(Packed));
    transpose<int64_t>(square);
    for (int row = 0; row < rows; ++row) {
      if (first + kRows <= n) {
        unpack(square[row], values + row * n + first, index + row * n + first);
        continue;
      }
      unpack(square[row], few, places);
      std::memcpy(values + row * n + first, few, (n - first) * sizeof(float));
      std::memcpy(index + row * n + first, places, (n - first) * sizeof(Index));
    }
  }
}

template <typename Float, typename Index>
void sort_all(int64_t count, int64_t n, Float* values, Index* index, void* scratch) {
  if constexpr (std::is_same_v<Float, float>)
    for (; n <= kNetwork && count >= kRows / 2; values += kRows * n, index += kRows * n) {
      const int missing = count < kRows ? static_cast<int>(kRows - count) : 0;
      network_sort(n, missing, values, index, static_cast<char*>(scratch));
      if ((count -= kRows) <= 0) return;
    }
  auto* keyed = static_cast<Keyed<KeyOf<Float>>*>(scratch);
  for (int64_t row = 0; row < count; ++row, values += n, index += n) {
    if (n <= kRankSort && rank_sort(static_cast<int>(n), values, index)) continue;
    if (n < kWideDigits)
      radix_sort<8>(n, values, index, keyed, keyed + n);
    else
      radix_sort<11>(n, values, index, keyed, keyed + n);
  }
}

}  // namespace

void sort_rows(bool wide, bool short_index, int64_t count, int64_t n, void* values, void* index, void* scratch) {
  if (wide && short_index)
    return sort_all(count, n, static_cast<double*>(values), static_cast<int16_t*>(index), scratch);
  if (wide) return sort_all(count, n, static_cast<double*>(values), static_cast<int32_t*>(index), scratch);
  if (short_index) return sort_all(count, n, static_cast<float*>(values), static_cast<int16_t*>(index), scratch);
  sort_all(count, n, static_cast<float*>(values), static_cast<int32_t*>(index), scratch);
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
