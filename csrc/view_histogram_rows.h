// Rows, lines and squares: how the kernels of view_histogram turn samples in memory into one row per position. For
// kernel files only, as simd.h.
#pragma once

#include "simd.h"
#include "view_histogram.h"

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

// What elements are squared and summed in.
template <typename E>
using Acc = std::conditional_t<sizeof(E) == 8, double, float>;

// A row: one value per sample.
template <typename E>
struct Row {
  static constexpr int width = vector_bytes / sizeof(Acc<E>), lanes = kRowBytes / sizeof(Acc<E>), parts = lanes / width;
  Vec<Acc<E>> part[parts];

  __attribute__((always_inline)) void write(void* p) const {
    for (int i = 0; i < parts; ++i) store(static_cast<Acc<E>*>(p) + i * width, part[i]);
  }
  __attribute__((always_inline)) void add(const void* p) {
    for (int i = 0; i < parts; ++i) part[i] += load<Vec<Acc<E>>>(static_cast<const Acc<E>*>(p) + i * width);
  }
};

// The same in float64, for sums that end in a result.
template <typename E>
struct WideRow {
  static constexpr int width = vector_bytes / sizeof(double), parts = Row<E>::lanes / width;
  Vec<double> part[parts];

  __attribute__((always_inline)) void add(const Acc<E>* p) {
    for (int i = 0; i < parts; ++i) part[i] += load_as<double>(p + i * width);
  }
};

constexpr int64_t kReadBytes = 768 << 10;  // what a second-level cache holds beside the work of an item

// Lanes apart: one line per sample, longer than a box so that lines do not compete for the same cache sets.
template <typename E>
constexpr int kLine = kBox + kRowBytes / sizeof(Acc<E>);

// Transposes the first `count` positions, in whole squares, between lines[lane][position] and rows[position][lane].
template <typename E, bool to_rows>
void transpose_positions(int count, const Acc<E>* from, Acc<E>* to) {
  using R = Row<E>;
  for (int part = 0; part < R::parts; ++part)
    for (int p = 0; p < count; p += R::width) {
      const auto place = [&](bool row, int i) __attribute__((always_inline)) {
        return row ? (p + i) * R::lanes + part * R::width : (part * R::width + i) * kLine<E> + p;
      };
      Vec<Acc<E>> square[R::width];
      ADD_OPS_UNROLL
      for (int i = 0; i < R::width; ++i) square[i] = load<Vec<Acc<E>>>(from + place(!to_rows, i));
      transpose<Acc<E>>(square);
      ADD_OPS_UNROLL
      for (int i = 0; i < R::width; ++i) store(to + place(to_rows, i), square[i]);
    }
}

// Where a box lies, and where it begins along each view.
struct Box {
  const BoxShape* shape;
  const BoxTable* table;  // (views,)
  int64_t start[3];
  int64_t offset(const int64_t* stride) const {
    return start[0] * stride[0] + start[1] * stride[1] + start[2] * stride[2];
  }
};

Box find_box(const Grid& grid, int64_t index) {
  Box box;
  int shape = 0;
  for (int axis = 2; axis >= 0; --axis) {
    box.start[axis] = index % grid.boxes[axis] * grid.box[axis];
    index /= grid.boxes[axis];
    if (box.start[axis] + grid.box[axis] > grid.length[axis]) shape |= 1 << axis;
  }
  box.shape = &grid.shape[shape];
  box.table = &grid.table[shape * grid.views];
  return box;
}

int64_t offset_in_box(const BoxShape& shape, int p, const int64_t* stride) {
  const int plane = shape.extent[1] * shape.extent[2];
  return p / plane * stride[0] + p % plane / shape.extent[2] * stride[1] + p % shape.extent[2] * stride[2];
}

// The item's samples in one of the arrays.
template <typename E>
struct Samples {
  E* data;
  const int64_t* stride;
  int64_t lane[Row<E>::lanes];  // where a sample begins; spare lanes repeat the last sample
  int count;

  Samples(const Array& array, const Item& item) : data(static_cast<E*>(array.data)), stride(array.stride) {
    count = item.batch - item.first < Row<E>::lanes ? static_cast<int>(item.batch - item.first) : Row<E>::lanes;
    for (int i = 0; i < Row<E>::lanes; ++i) lane[i] = (item.first + (i < count ? i : count - 1)) * array.batch_stride;
  }
  E* at(const Box& box, int p) const { return data + box.offset(stride) + offset_in_box(*box.shape, p, stride); }
};

// Reads one byte of every line between the item's first and last position, where the cache can hold them all: in order,
// as hardware foresees, while the boxes ask for a few lines here and there.
template <typename E>
void read_in_order(const Grid& grid, const Item& item, const Samples<E>& samples) {
  const Box first = find_box(grid, item.begin), last = find_box(grid, item.end - 1);
  const E *begin = samples.at(first, 0), *end = samples.at(last, last.shape->count - 1) + 1;
  if (end - begin > kReadBytes / static_cast<int64_t>(sizeof(E)) / Row<E>::lanes) return;
  for (int i = 0; i < samples.count; ++i)
    for (const E* at = begin + samples.lane[i]; at < end + samples.lane[i]; at += kRowBytes / sizeof(E))
      static_cast<void>(*reinterpret_cast<const volatile char*>(at));
}

// Calls body(p, x, x_lane, y, y_lane) for squares of all lanes by as many positions as fill a vector, from position p
// on: lane i's are at x + x_lane[i]. A run of positions may end in two squares that overlap; runs shorter than a square
// are copied, x before the call, y after it.
template <typename E, typename Body>
ADD_OPS_INLINE void for_each_square(const Box& box, const Samples<E>& in, const Samples<E>* out, const Body& body) {
  using R = Row<E>;
  const int run = box.shape->run, count = box.shape->count;
  if (run >= R::width) {
    for (int p = 0; p < count; p += run) {
      const auto* x = in.at(box, p);
      E* y = out ? out->at(box, p) : nullptr;
      for (int i = 0; i < run; i += R::width) {
        const int at = i + R::width <= run ? i : run - R::width;
        body(p + at, x + at, in.lane, out ? y + at : nullptr, out ? out->lane : nullptr);
      }
    }
    return;
  }
  E x[R::lanes * R::width], y[R::lanes * R::width];
  int64_t lane[R::lanes];
  for (int i = 0; i < R::lanes; ++i) lane[i] = i * R::width;
  for (int p = 0; p < count; p += R::width) {
    const int here = count - p < R::width ? count - p : R::width;
    for (int j = 0; j < R::width; ++j)
      for (int i = 0; i < R::lanes; ++i) x[lane[i] + j] = in.at(box, p + (j < here ? j : 0))[in.lane[i]];
    body(p, x, lane, y, lane);
    for (int j = 0; out && j < here; ++j)
      for (int i = 0; i < out->count; ++i) out->at(box, p + j)[out->lane[i]] = y[lane[i] + j];
  }
}

}  // namespace
}  // namespace ADD_OPS_ISA
}  // namespace add_ops
