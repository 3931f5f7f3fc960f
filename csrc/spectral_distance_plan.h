// Plans for spectral_distance_fft.h: how a length is cut into radices, and where its points stand.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <numeric>
#include <vector>

#include "spectral_distance.h"

namespace add_ops {

// Owns the tables that a Plan points to.
template <typename T>
class PlanBuilder {
 public:
  PlanBuilder(int height, int width) {
    // A column's points must not crowd into a few sets of a cache whose sets repeat every 4 KiB.
    const bool crowded = height > 8 && width % 32 == 0;
    plan.height = height, plan.width = width, plan.pitch = width + crowded;
    // For the same reason channels whose starts would share a set are moved apart, by a vector or two.
    plan.staged_pitch = height * width + (height * width * sizeof(T) % 4096 == 0 ? 16 : 0);
    // As much as a second-level cache can hold beside the plane; tiny maps are quicker straight through the first one.
    const int64_t group_bytes = int64_t(plan.staged_pitch) * 128;
    plan.staged_groups =
        height * width < 64 ? 1 : static_cast<int>(std::clamp<int64_t>((288 << 10) / group_bytes, 1, 16));
    plan.small = height * width <= 256;
    plan.rows = axis(width);
    plan.columns = height == width ? plan.rows : axis(height);
    std::vector<int> slots(static_cast<size_t>(height) * width);
    for (int h = 0; h < height; ++h)
      for (int w = 0; w < width; ++w)
        slots[static_cast<size_t>(h) * width + w] =
            plan.columns.slot_of_index[h] * plan.pitch + plan.rows.slot_of_index[w];
    plan.slot_of_pixel = keep(std::move(slots));
    std::vector<int> rows(plan.columns.slot_of_frequency, plan.columns.slot_of_frequency + height);
    for (int& row : rows) row *= plan.pitch;
    plan.row_of_frequency = keep(std::move(rows));
  }
  PlanBuilder(const PlanBuilder&) = delete;

  Plan<T> plan;

 private:
  // n = first radix · rest. Where both are coprime, n = rest·n1 + radix·n2 (mod length) and k ≡ k1 (mod radix), k2 (mod
  // rest) turn the DFT into a two-dimensional one without twiddles (Good 1958, Thomas 1963); else it is Cooley and
  // Tukey's decimation in frequency, n = rest·n1 + n2 and k = k1 + radix·k2. Either way n stands in slot
  // n1·rest + slot(n2).
  Axis<T> axis(int length) {
    const std::vector<int> radices = radices_of(length);
    Axis<T> axis{};
    axis.length = length, axis.stages = static_cast<int>(radices.size());
    std::vector<int> index{0}, frequency{0};  // slots of the part behind the current stage
    int rest = 1;
    for (int i = axis.stages - 1; i >= 0; --i) {
      const int radix = radices[i], n = radix * rest;
      const bool coprime = std::gcd(radix, rest) == 1;
      std::vector<int> new_index(n), new_frequency(n);
      for (int a = 0; a < radix; ++a) {
        for (int b = 0; b < rest; ++b) {
          new_index[coprime ? (rest * a + radix * b) % n : rest * a + b] = a * rest + index[b];
          const int k = a + radix * b;
          new_frequency[k] = coprime ? k % radix * rest + frequency[k % rest] : a * rest + frequency[b];
        }
      }
      const T* twiddles = coprime ? nullptr : keep(twiddles_of(radix, rest, index));
      const T* matrix = has_codelet(radix) ? nullptr : keep(matrix_of(radix));
      axis.stage[i] = {radix, length / n, rest, twiddles, matrix};
      index = std::move(new_index), frequency = std::move(new_frequency), rest = n;
    }
    axis.slot_of_index = keep(std::move(index)), axis.slot_of_frequency = keep(std::move(frequency));
    return axis;
  }

  static bool has_codelet(int radix) { return radix <= 5 || radix == 7 || radix == 8 || radix == 16; }

  static std::vector<int> radices_of(int length) {
    std::vector<int> radices;
    int power_of_two = length & -length, odd = length / power_of_two;
    for (int prime = 3; odd > 1; prime += 2)
      for (; odd % prime == 0; odd /= prime) radices.push_back(prime);
    while (power_of_two > 1) {
      const int radix = power_of_two == 32                        ? 4
                        : power_of_two == 16 || power_of_two > 64 ? 16
                                                                  : std::min(power_of_two, 8);
      radices.push_back(radix);
      power_of_two /= radix;
    }
    return radices;
  }

  static std::vector<T> twiddles_of(int radix, int rest, const std::vector<int>& slot) {
    std::vector<T> twiddles(static_cast<size_t>(rest) * (radix - 1) * 2);
    for (int b = 0; b < rest; ++b) {
      for (int q = 1; q < radix; ++q) {
        T* entry = &twiddles[(static_cast<size_t>(slot[b]) * (radix - 1) + q - 1) * 2];
        entry[0] = static_cast<T>(std::cos(turn(int64_t(q) * b, radix * rest)));
        entry[1] = static_cast<T>(-std::sin(turn(int64_t(q) * b, radix * rest)));
      }
    }
    return twiddles;
  }

  static std::vector<T> matrix_of(int radix) {
    const int half = radix / 2;
    std::vector<T> matrix(static_cast<size_t>(half) * half * 2);
    for (int k = 0; k < half; ++k) {
      for (int j = 0; j < half; ++j) {
        const double angle = turn(int64_t(k + 1) * (j + 1), radix);
        matrix[size_t(k) * half + j] = static_cast<T>(std::cos(angle));
        matrix[size_t(k + half) * half + j] = static_cast<T>(std::sin(angle));
      }
    }
    return matrix;
  }

  static double turn(int64_t numerator, int denominator) {
    return 2 * 3.14159265358979323846 * static_cast<double>(numerator % denominator) / denominator;
  }

  const int* keep(std::vector<int> table) { return integers_.emplace_back(std::move(table)).data(); }
  const T* keep(std::vector<T> table) { return reals_.emplace_back(std::move(table)).data(); }

  std::deque<std::vector<int>> integers_;
  std::deque<std::vector<T>> reals_;
};

}  // namespace add_ops
