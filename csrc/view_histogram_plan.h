// The plan of a call of view_histogram: boxes, views, tables and parts.
//
// How boxes are cut into bins, by an example: twelve positions in a row, the view (0, 0, 1) and four bins. The rule in
// integers, which is kept bit for bit, is in add_ops/multi_view/README.md: a step is round(2^30 / 11), position n
// stands at T = step * n, and its place, in bins, is T * 4 / (11 * step + 1).
//
//   position    0     1     2     3     4     5     6     7     8     9     10    11
//   place     0.00  0.36  0.73  1.09  1.45  1.82  2.18  2.55  2.91  3.27  3.64  4.00 - 4e-9
//   bin         0     0     0     1     1     1     2     2     2     3     3     3
//
// A division for every position is slow, so let there be three boxes of four. In all boxes of a shape the positions
// have the same distances from the lowest one, here 0.00, 0.36, 0.73, 1.09. They are sorted, and made fixed-point
// numbers, once (BoxTable). A box divides for its lowest position alone (BoxStart), adds the rest of that to the
// distances, and is cut where the whole part of the sum changes (find_cuts):
//
//   positions   lowest                   rest + distances            cut into
//   0 … 3       0.00: bin 0, rest 0.00   0.00  0.36  0.73 | 1.09     three in bin 0, one in bin 1
//   4 … 7       1.45: bin 1, rest 0.45   0.45  0.82 | 1.18  1.55     two in bin 1, two in bin 2
//   8 … 11      2.91: bin 2, rest 0.91   0.91 | 1.27  1.64  2.00     one in bin 2, three in bin 3
//
// The first sum, 0, and the last one, 2 - 4e-9, are nearer to the edge of a bin than fixed point is exact. A box with
// such a sum is divided position by position (exact_bin).
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "parallel.h"
#include "view_histogram.h"

namespace add_ops {

constexpr int kLanes = kRowBytes / sizeof(float);  // the most samples in a row

struct Problem {
  Feature type;
  Array features, out;
  int64_t batch, length[3];  // the axes as they are: C, H, W
  bool wide() const { return type == Feature::float64; }
  int lanes() const { return wide() ? kLanes / 2 : kLanes; }
  int64_t groups() const { return (batch + lanes() - 1) / lanes(); }
  int64_t positions() const { return length[0] * length[1] * length[2]; }
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The length of equal pieces of `length`, none longer than `most`.
inline int64_t even_piece(int64_t length, int64_t most) { return ceil_divide(length, ceil_divide(length, most)); }

// Integer steps of a view along C, H, W; the rounding is part of the definition, so no operation here may be fused.
inline void integer_steps(const double* direction, const int64_t* length, bool unit, int64_t* step) {
  double s[3], reach = 0;
  for (int i = 0; i < 3; ++i) {
    s[i] = length[i] == 1 ? 0 : unit ? 2 * direction[i] / static_cast<double>(length[i] - 1) : direction[i];
    reach += std::fabs(s[i]) * static_cast<double>(length[i] - 1);
  }
  for (int i = 0; i < 3; ++i) step[i] = reach == 0 ? 0 : static_cast<int64_t>(std::nearbyint(s[i] / reach * 0x1p30));
}

// Buckets of equal width first, in which few keys stand together; then by insertion.
inline void sort_keys(uint64_t* keys, int count) {
  uint64_t most = 0, placed[kBox];
  for (int p = 0; p < count; ++p) most = std::max(most, keys[p]);
  int shift = 0, end[kBox + 1] = {};
  while (most >> shift >= kBox) ++shift;
  for (int p = 0; p < count; ++p) ++end[(keys[p] >> shift) + 1];
  for (int bucket = 0; bucket < kBox; ++bucket) end[bucket + 1] += end[bucket];
  for (int p = 0; p < count; ++p) placed[end[keys[p] >> shift]++] = keys[p];
  for (int p = 0; p < count; ++p) {
    int at = p;
    for (; at > 0 && keys[at - 1] > placed[p]; --at) keys[at] = keys[at - 1];
    keys[at] = placed[p];
  }
}

// The tables of all shapes along one view, `views` apart. The whole box is sorted; one cut short keeps that order.
inline void fill_tables(const Grid& grid, const View& view, bool sorted, BoxTable* tables) {
  uint64_t keys[kBox];  // the distance, below 2^40, above the three indices
  const int* box = grid.box;
  const auto lowest_corner = [&](const int* extent) {
    int64_t sum = 0;
    for (int i = 0; i < 3; ++i) sum += std::min<int64_t>(view.step[i], 0) * (extent[i] - 1);
    return sum;
  };
  const int64_t lowest = lowest_corner(box);
  int count = 0;
  for (int64_t i = 0; i < box[0]; ++i)
    for (int64_t j = 0; j < box[1]; ++j) {
      const int64_t distance = view.step[0] * i + view.step[1] * j - lowest;
      for (int64_t k = 0; k < box[2]; ++k)
        keys[count++] = static_cast<uint64_t>((distance + view.step[2] * k) << 24 | i << 16 | j << 8 | k);
    }
  if (sorted) sort_keys(keys, count);
  for (int index = 0; index < kShapes; ++index) {
    const BoxShape& shape = grid.shape[index];
    if (shape.count == 0) continue;
    BoxTable& table = tables[index * grid.views];
    table.lowest_corner = lowest_corner(shape.extent);
    int used = 0;
    for (int p = 0; p < count; ++p) {
      const int i = keys[p] >> 16 & 255, j = keys[p] >> 8 & 255, k = keys[p] & 255;
      if (i >= shape.extent[0] || j >= shape.extent[1] || k >= shape.extent[2]) continue;
      table.distance[used] = static_cast<int64_t>(keys[p] >> 24) + lowest - table.lowest_corner;
      table.row[used] = static_cast<uint16_t>((1 + (i * shape.extent[1] + j) * shape.extent[2] + k) * kRowBytes);
      table.distance_in_bins[used] =
          static_cast<uint32_t>(static_cast<double>(table.distance[used] * grid.bins) * view.to_fixed_point);
      ++used;
    }
    std::fill(table.distance + used, std::end(table.distance), table.distance[0]);
    std::fill(table.row + used, std::end(table.row), 0);
    std::fill(table.distance_in_bins + used, std::end(table.distance_in_bins), table.distance_in_bins[0]);
  }
}

// A Grid with the arrays that it points into.
struct Plan {
  Grid grid;
  std::vector<View> views;
  std::unique_ptr<BoxTable[]> tables;

  Plan(const Problem& p, const double* directions, int64_t count, int64_t bins, bool unit, bool sorted, int threads)
      : views(count) {
    int axes[3] = {0, 1, 2};
    const auto reach = [&](int a) { return p.length[a] == 1 ? INT64_MAX : std::abs(p.features.stride[a]); };
    std::stable_sort(axes, axes + 3, [&](int a, int b) { return reach(a) > reach(b); });
    for (int i = 0; i < 3; ++i) {
      grid.length[i] = p.length[axes[i]];
      features.stride[i] = p.features.stride[axes[i]];
      out.stride[i] = p.out.stride[axes[i]];
    }
    features.data = p.features.data, features.batch_stride = p.features.batch_stride;
    out.data = p.out.data, out.batch_stride = p.out.batch_stride;
    choose_boxes(sorted);

    grid.bins = bins;
    grid.views = static_cast<int>(count);
    grid.fraction_bits = 31;
    for (int64_t k = 0; k < count; ++k) {
      View& view = views[k];
      int64_t step[3], total = 0;
      integer_steps(directions + 3 * k, p.length, unit, step);
      view.base = 0;
      double box_bins = 0;
      for (int i = 0; i < 3; ++i) {
        view.step[i] = step[axes[i]];
        view.base -= std::min<int64_t>(view.step[i], 0) * (grid.length[i] - 1);
        total += std::abs(view.step[i]) * (grid.length[i] - 1);
        box_bins += static_cast<double>(std::abs(view.step[i]) * (grid.box[i] - 1));
      }
      view.divisor = total + 1;
      box_bins = box_bins * static_cast<double>(bins) / static_cast<double>(view.divisor) + 2;
      view.always_divide = box_bins > kBox;
      while (!view.always_divide && std::ldexp(box_bins, grid.fraction_bits) >= 0x1p32) --grid.fraction_bits;
    }
    for (View& view : views)
      view.to_fixed_point =
          view.always_divide ? 0 : std::ldexp(1.0, grid.fraction_bits) / static_cast<double>(view.divisor);
    tables.reset(new BoxTable[kShapes * count]);
    grid.view = views.data();
    grid.table = tables.get();
    parallel_for(count, threads, [&](int64_t k, int) { fill_tables(grid, views[k], sorted, &tables[k]); });
  }

  Array features, out;  // with their strides in the grid's order

  int64_t boxes() const { return grid.boxes[0] * grid.boxes[1] * grid.boxes[2]; }

 private:
  // Compact boxes meet few bins along every view, which the forward likes; long ones read and write memory in order.
  void choose_boxes(bool sorted) {
    int64_t box[3], room = kBox;
    if (sorted) {
      box[2] = grid.length[2] % 16 == 0 ? 16 : even_piece(grid.length[2], 32);
      box[1] = even_piece(grid.length[1], std::max<int64_t>(32 / box[2], 1));
    } else {
      box[2] = even_piece(grid.length[2], grid.length[2] <= 64 ? 64 : 32);
      room /= box[2];
      box[1] = grid.length[1] <= room ? grid.length[1] : even_piece(grid.length[1], room);
    }
    room = kBox / box[2] / box[1];
    box[0] = even_piece(grid.length[0], room);
    for (int i = 0; i < 3; ++i) {
      grid.box[i] = static_cast<int>(box[i]);
      grid.boxes[i] = ceil_divide(grid.length[i], box[i]);
    }
    for (int index = 0; index < kShapes; ++index) {
      BoxShape& shape = grid.shape[index];
      shape.count = 1;
      for (int i = 0; i < 3; ++i) {
        const int64_t tail = grid.length[i] % box[i];
        shape.extent[i] = static_cast<int>(index >> i & 1 ? tail : box[i]);
        shape.count *= shape.extent[i];
      }
      shape.run = 1;
      for (int i = 2; i >= 0; --i) {
        if (features.stride[i] != shape.run || out.stride[i] != shape.run) {
          if (shape.extent[i] != 1) break;
          continue;
        }
        shape.run *= shape.extent[i];
        if (shape.extent[i] != grid.length[i]) break;
      }
    }
  }
};

// The boxes are cut into parts, each summed into rows of its own: only of the bins that it can reach.
struct Part {
  int64_t begin, end, rows;
  std::vector<int64_t> offset;                         // (views,) of bin 0, so possibly before the part's rows
  std::vector<std::pair<int64_t, int64_t>> reachable;  // (views,) bins [first, last)
};

inline Part make_part(const Grid& grid, int64_t begin, int64_t end) {
  Part part{begin, end, 0, {}, {}};
  int64_t low[3] = {0, 0, 0}, high[3] = {grid.boxes[0] - 1, grid.boxes[1] - 1, grid.boxes[2] - 1};
  int64_t inner = grid.boxes[1] * grid.boxes[2], first = begin, last = end - 1;
  for (int i = 0; i < 3; ++i) {
    low[i] = first / inner, high[i] = last / inner;
    if (low[i] != high[i]) break;
    first %= inner, last %= inner;
    inner /= i < 2 ? grid.boxes[i + 1] : 1;
  }
  for (int i = 0; i < 3; ++i)
    low[i] *= grid.box[i], high[i] = std::min(grid.length[i], (high[i] + 1) * grid.box[i]) - 1;
  for (int k = 0; k < grid.views; ++k) {
    const View& view = grid.view[k];
    int64_t from = view.base, to = view.base;
    for (int i = 0; i < 3; ++i) {
      from += view.step[i] * (view.step[i] > 0 ? low[i] : high[i]);
      to += view.step[i] * (view.step[i] > 0 ? high[i] : low[i]);
    }
    const int64_t first_bin = from * grid.bins / view.divisor, last_bin = to * grid.bins / view.divisor + 1;
    part.reachable.emplace_back(first_bin, last_bin);
    part.offset.push_back(part.rows - first_bin);
    part.rows += last_bin - first_bin;
  }
  return part;
}

// As many parts as make kItems items, as long as their rows stay below 7/16 of the features, or 1 MiB.
inline std::vector<Part> make_parts(const Problem& p, const Plan& plan) {
  const int64_t room = std::max<int64_t>(p.batch * p.positions() * (p.wide() ? 8 : 4) / 16 * 7, 1 << 20);
  for (int64_t count = std::min(plan.boxes(), std::max<int64_t>(1, kItems / p.groups()));; count /= 2) {
    std::vector<Part> parts;
    int64_t rows = 0;
    for (int64_t i = 0; i < count; ++i) {
      parts.push_back(make_part(plan.grid, plan.boxes() * i / count, plan.boxes() * (i + 1) / count));
      rows += parts.back().rows;
    }
    if (count == 1 || rows * kRowBytes * p.groups() <= room) return parts;
  }
}

}  // namespace add_ops
