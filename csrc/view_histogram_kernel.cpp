// The inner loops of view_histogram. Compiled once per instruction set; see view_histogram.h for the layout.
#include "view_histogram.h"

#include "vectors.h"

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

// A row: one value per sample.
template <typename Type>
struct Row {
  using Acc = typename Type::Acc;
  using Vec = typename Type::Vec;
  static constexpr int width = kVectorBytes / sizeof(Acc), lanes = kRowBytes / sizeof(Acc), parts = lanes / width;
  Vec part[parts];

  __attribute__((always_inline)) void write(void* p) const {
    for (int i = 0; i < parts; ++i) store_bits(static_cast<Acc*>(p) + i * width, part[i]);
  }
  __attribute__((always_inline)) void add(const void* p) {
    for (int i = 0; i < parts; ++i) part[i] += load_bits<Vec>(static_cast<const Acc*>(p) + i * width);
  }
};

ADD_OPS_INLINE VecD widen(const float* p) { return __builtin_convertvector(load_bits<VecN>(p), VecD); }
ADD_OPS_INLINE VecD widen(const double* p) { return load_bits<VecD>(p); }
ADD_OPS_INLINE void narrow(VecD value, float* p) { store_bits(p, __builtin_convertvector(value, VecN)); }
ADD_OPS_INLINE void narrow(VecD value, double* p) { store_bits(p, value); }

// The same in float64, for sums that end in a result.
template <typename Type>
struct WideRow {
  using Acc = typename Type::Acc;
  static constexpr int width = kVectorBytes / sizeof(double), parts = Row<Type>::lanes / width;
  VecD part[parts];

  __attribute__((always_inline)) void add(const Acc* p) {
    for (int i = 0; i < parts; ++i) part[i] += widen(p + i * width);
  }
};

// Lanes apart: one line per sample, longer than a box so that lines do not compete for the same cache sets.
template <typename Type>
constexpr int kLine = kBox + kRowBytes / sizeof(typename Type::Acc);

// Transposes the first `count` positions between lines[lane][position] and rows[position][lane], whole squares at a time.
template <typename Type>
void lines_to_rows(int count, const typename Type::Acc* lines, typename Type::Acc* rows) {
  using R = Row<Type>;
  for (int part = 0; part < R::parts; ++part)
    for (int p = 0; p < count; p += R::width) {
      typename R::Vec square[R::width];
#pragma GCC unroll 16
      for (int i = 0; i < R::width; ++i) square[i] = load_bits<typename R::Vec>(lines + (part * R::width + i) * kLine<Type> + p);
      transpose<1>(square);
#pragma GCC unroll 16
      for (int i = 0; i < R::width; ++i) store_bits(rows + (p + i) * R::lanes + part * R::width, square[i]);
    }
}
template <typename Type>
void rows_to_lines(int count, const typename Type::Acc* rows, typename Type::Acc* lines) {
  using R = Row<Type>;
  for (int part = 0; part < R::parts; ++part)
    for (int p = 0; p < count; p += R::width) {
      typename R::Vec square[R::width];
#pragma GCC unroll 16
      for (int i = 0; i < R::width; ++i) square[i] = load_bits<typename R::Vec>(rows + (p + i) * R::lanes + part * R::width);
      transpose<1>(square);
#pragma GCC unroll 16
      for (int i = 0; i < R::width; ++i) store_bits(lines + (part * R::width + i) * kLine<Type> + p, square[i]);
    }
}

// Where a box lies, and where it begins along each view.
struct Box {
  const BoxShape* shape;
  const BoxTable* table;  // (views,)
  int64_t start[3];
  int64_t offset(const int64_t* stride) const { return start[0] * stride[0] + start[1] * stride[1] + start[2] * stride[2]; }
};

Box find_box(const Grid& grid, int64_t index) {
  Box box;
  int cut = 0;
  for (int axis = 2; axis >= 0; --axis) {
    box.start[axis] = index % grid.boxes[axis] * grid.box[axis];
    index /= grid.boxes[axis];
    if (box.start[axis] + grid.box[axis] > grid.length[axis]) cut |= 1 << axis;
  }
  box.shape = &grid.shape[cut];
  box.table = &grid.table[cut * grid.views];
  return box;
}

// How far the item's next box lies ahead of this one in memory, for prefetching.
int64_t to_next(const Grid& grid, const Box& box, int64_t b, const Item& item, const Array& features) {
  return b + 1 < item.end ? find_box(grid, b + 1).offset(features.stride) - box.offset(features.stride) : 0;
}

// Calls body(position, element offset in a, element offset in b) for each run of a box that is contiguous in memory.
template <typename Body>
ADD_OPS_INLINE void for_each_run(const Box& box, const int64_t* stride_a, const int64_t* stride_b, const Body& body) {
  const BoxShape& shape = *box.shape;
  const int plane = shape.extent[1] * shape.extent[2];
  for (int p = 0; p < shape.count; p += shape.run) {
    const int i = p / plane, j = p % plane / shape.extent[2], k = p % shape.extent[2];
    body(p, box.offset(stride_a) + i * stride_a[0] + j * stride_a[1] + k * stride_a[2],
         box.offset(stride_b) + i * stride_b[0] + j * stride_b[1] + k * stride_b[2]);
  }
}

// squares[position] = (x * scale)^2, a row per position.
template <typename Type>
void load_squares(const Array& features, const Box& box, int64_t ahead, const Item& item, const double* scale, typename Type::Acc* squares) {
  using R = Row<Type>;
  using Acc = typename R::Acc;
  alignas(64) Acc lines[R::lanes * kLine<Type>];
  const int run = box.shape->run;
  for (int lane = 0; lane < R::lanes; ++lane) {
    const int64_t sample = item.first + lane < item.batch ? item.first + lane : item.batch - 1;  // spare lanes: not read
    const auto* x = static_cast<const typename Type::Store*>(features.data) + sample * features.batch_stride;
    const Acc factor = static_cast<Acc>(scale[lane]);
    for_each_run(box, features.stride, features.stride, [&](int p, int64_t at, int64_t) __attribute__((always_inline)) {
      Acc* line = lines + lane * kLine<Type> + p;
      int i = 0;
      for (; i + R::width <= run; i += R::width) {
        __builtin_prefetch(x + at + i + ahead, 0, 2);
        const auto value = load(Type{}, x + at + i) * factor;
        store_bits(line + i, value * value);
      }
      for (; i < run; ++i) {
        const Acc value = load_one(Type{}, x + at + i) * factor;
        line[i] = value * value;
      }
    });
  }
  lines_to_rows<Type>(box.shape->count, lines, squares);
}

// A bin's positions in the sorted list of a box: they end before `end`.
struct Segment {
  int64_t bin;
  int end;
};

// T(first position) * bins = bin * divisor + rest.
struct BoxStart {
  int64_t scaled, bin;
  uint32_t level;
};
BoxStart box_start(const Grid& grid, const View& view, const BoxTable& table, const Box& box) {
  BoxStart s;
  s.scaled = (view.base + table.corner + view.step[0] * box.start[0] + view.step[1] * box.start[1] +
              view.step[2] * box.start[2]) * grid.bins;
  s.bin = s.scaled / view.divisor;
  s.level = static_cast<uint32_t>(static_cast<double>(s.scaled - s.bin * view.divisor) * view.scale);
  return s;
}
ADD_OPS_INLINE int64_t exact_bin(const Grid& grid, const View& view, const BoxStart& start, int64_t t) {
  return (start.scaled + t * grid.bins) / view.divisor;
}

int cut_exactly(const Grid& grid, const View& view, const BoxTable& table, const BoxStart& start, int count, Segment* segments) {
  int used = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t bin = exact_bin(grid, view, start, table.t[i]);
    if (used == 0 || segments[used - 1].bin != bin) segments[used++].bin = bin;
    segments[used - 1].end = i + 1;
  }
  return used;
}

// level[i] + start.level, in units of 1 / 2^shift bin, is the true place of a position to within 3 units (each of the two
// is a truncated double). So the list is cut where the whole part changes; if a position beside a cut lies within 3 units
// of it, which is rare, the box is divided exactly. The first position needs no such care: its level is not below 0.
int cut_into_bins(const Grid& grid, const View& view, const BoxTable& table, const Box& box, Segment* segments) {
  constexpr int width = kVectorBytes / sizeof(uint32_t);
  const BoxStart start = box_start(grid, view, table, box);
  const int count = box.shape->count;
  if (view.exact) return cut_exactly(grid, view, table, start, count, segments);
  const uint32_t mask = (uint32_t{1} << view.shift) - 1;
  int used = 0;
  uint32_t doubtful = 0;
  for (int first = 0; first < count; first += 64) {
    uint64_t cuts = 0;  // bit i: position first + i + 1 lies in a later bin than position first + i
#pragma GCC unroll 16
    for (int i = 0; i < 64; i += width) {
      const VecU here = (load_bits<VecU>(table.level + first + i) + start.level) >> view.shift;
      const VecU next = (load_bits<VecU>(table.level + first + i + 1) + start.level) >> view.shift;
      cuts |= static_cast<uint64_t>(lane_bits((VecU)(here != next))) << i;
    }
    if (count - first <= 64) {
      const uint64_t last = uint64_t{1} << (count - first - 1);
      cuts = (cuts & (last - 1)) | last;
    }
    for (; cuts != 0; cuts &= cuts - 1, ++used) {
      const int end = first + __builtin_ctzll(cuts) + 1;
      const uint32_t below = table.level[end - 1] + start.level, above = table.level[end] + start.level;
      segments[used].bin = start.bin + (below >> view.shift);
      segments[used].end = end;
      doubtful |= ((below + 3) & mask) <= 6;
      doubtful |= ((above + 3) & mask) <= 6;
    }
  }
  return doubtful ? cut_exactly(grid, view, table, start, count, segments) : used;
}

template <typename Type>
void sum_boxes(const Grid& grid, const Array& features, const Item& item, const double* scale, char* rows, const int64_t* offset) {
  using R = Row<Type>;
  alignas(64) typename R::Acc squares[kBox * R::lanes];
  const char* source = reinterpret_cast<const char*>(squares);
  Segment segments[kBox];
  for (int64_t b = item.begin; b < item.end; ++b) {
    const Box box = find_box(grid, b);
    load_squares<Type>(features, box, to_next(grid, box, b, item, features), item, scale, squares);
    for (int k = 0; k < grid.views; ++k) {
      const BoxTable& table = box.table[k];
      const int used = cut_into_bins(grid, grid.view[k], table, box, segments);
      char* target = rows + offset[k] * kRowBytes;
      for (int s = 0, i = 0; s < used; ++s) {
        const int end = segments[s].end;
        R sum{}, other{};  // from zero, so that long sums round little
        for (; i + 2 <= end; i += 2) {
          sum.add(source + table.row[i]);
          other.add(source + table.row[i + 1]);
        }
        if (i < end) sum.add(source + table.row[i++]);
        for (int part = 0; part < R::parts; ++part) sum.part[part] += other.part[part];
        sum.add(target + segments[s].bin * kRowBytes);
        sum.write(target + segments[s].bin * kRowBytes);
      }
    }
  }
}

template <typename Type>
void total(int64_t count, const typename Type::Acc* rows, double* sum) {
  WideRow<Type> lanes{};
  for (int64_t j = 0; j < count; ++j) lanes.add(rows + j * Row<Type>::lanes);
  std::memcpy(sum, &lanes, sizeof lanes);
}

template <typename Type>
void finish(int64_t bins, int parts, const void* const* rows, const int64_t (*range)[2], const double* factor, int lanes,
            typename Type::Acc* out, int64_t out_stride) {
  using R = Row<Type>;
  using W = WideRow<Type>;
  using Acc = typename R::Acc;
  constexpr int height = 32;
  alignas(64) Acc tile[height * R::lanes], lines[R::lanes * kLine<Type>];
  for (int64_t first = 0; first < bins; first += height) {
    const int64_t last = first + height < bins ? first + height : bins;
    int near[kItems], count = 0;  // the parts that hold any of these bins
    for (int c = 0; c < parts; ++c)
      if (range[c][0] < last && range[c][1] > first) near[count++] = c;
    for (int64_t j = first; j < last; ++j) {
      W sum{};
      for (int i = 0; i < count; ++i) {
        const int c = near[i];
        if (j >= range[c][0] && j < range[c][1]) sum.add(static_cast<const Acc*>(rows[c]) + (j - range[c][0]) * R::lanes);
      }
      for (int i = 0; i < W::parts; ++i)
        narrow(sum.part[i] * load_bits<VecD>(factor + i * W::width), tile + (j - first) * R::lanes + i * W::width);
    }
    rows_to_lines<Type>(static_cast<int>(last - first), tile, lines);
    for (int lane = 0; lane < lanes; ++lane)
      std::memcpy(out + lane * out_stride + first, lines + lane * kLine<Type>, (last - first) * sizeof(Acc));
  }
}

template <typename Type>
void center_levels(int64_t bins, const typename Type::Acc* grad, const typename Type::Acc* attention, int64_t stride, int lanes,
                   typename Type::Acc* rows) {
  using R = Row<Type>;
  using Acc = typename R::Acc;
  constexpr int width = WideRow<Type>::width;
  Acc mean[R::lanes] = {};
  for (int lane = 0; lane < lanes; ++lane) {
    const Acc *g = grad + lane * stride, *a = attention + lane * stride;
    VecD even{}, odd{};
    int64_t j = 0;
    for (; j + 2 * width <= bins; j += 2 * width) {
      even += widen(g + j) * widen(a + j);
      odd += widen(g + j + width) * widen(a + j + width);
    }
    double total = 0;
    for (; j < bins; ++j) total += static_cast<double>(g[j]) * static_cast<double>(a[j]);
    for (int i = 0; i < width; ++i) total += even[i] + odd[i];
    mean[lane] = static_cast<Acc>(total);
  }
  alignas(64) Acc lines[R::lanes * kLine<Type>] = {}, tile[kBox * R::lanes];
  for (int64_t first = 0; first < bins; first += kBox) {
    const int count = static_cast<int>(first + kBox < bins ? kBox : bins - first);
    for (int lane = 0; lane < lanes; ++lane)
      for (int j = 0; j < count; ++j) lines[lane * kLine<Type> + j] = grad[lane * stride + first + j] - mean[lane];
    lines_to_rows<Type>(count, lines, tile);
    std::memcpy(rows + first * R::lanes, tile, count * kRowBytes);
  }
}

constexpr size_t kStreamBytes = 16 << 20;  // gradients larger than this bypass the caches
constexpr int kViewTile = 16, kPositionTile = 64;

// place[p] = byte offset of the row of position p's bin, counted from bin 0 of the first view of a tile.
void find_bins(const Grid& grid, const View& view, const BoxTable& table, const BoxStart& start, int first, int32_t base,
               int32_t* place) {
  const uint32_t mask = (uint32_t{1} << view.shift) - 1;
  const int32_t origin = base + static_cast<int32_t>(start.bin) * kRowBytes;
  uint32_t doubtful = view.exact;
  for (int i = 0; i < kPositionTile; ++i) {
    const uint32_t level = table.level[first + i] + start.level;
    doubtful |= ((level + 3) & mask) <= 6;
    place[i] = origin + static_cast<int32_t>(level >> view.shift) * kRowBytes;
  }
  if (doubtful)  // see cut_into_bins
    for (int i = 0; i < kPositionTile; ++i)
      place[i] = base + static_cast<int32_t>(exact_bin(grid, view, start, table.t[first + i])) * kRowBytes;
}

// levels[position] = sum over the views of the centred gradient of the position's bin, a row per position.
template <typename Type>
void gather_levels(const Grid& grid, const Box& box, const char* rows, typename Type::Acc* levels) {
  using R = Row<Type>;
  int32_t place[kViewTile][kPositionTile];
  for (int k0 = 0; k0 < grid.views; k0 += kViewTile) {
    const int tile = grid.views - k0 < kViewTile ? grid.views - k0 : kViewTile;
    const char* origin = rows + k0 * grid.bins * kRowBytes;
    BoxStart start[kViewTile];
    for (int k = 0; k < tile; ++k) start[k] = box_start(grid, grid.view[k0 + k], box.table[k0 + k], box);
    for (int first = 0; first < box.shape->count; first += kPositionTile) {
      for (int k = 0; k < tile; ++k)
        find_bins(grid, grid.view[k0 + k], box.table[k0 + k], start[k], first,
                  static_cast<int32_t>(k * grid.bins * kRowBytes), place[k]);
      const int count = box.shape->count - first < kPositionTile ? box.shape->count - first : kPositionTile;
      for (int i = 0; i < count; i += 4) {
        typename R::Acc* target = levels + (first + i) * R::lanes;
        R sum[4]{};
        for (int k = 0; k < tile; ++k)
          for (int j = 0; j < 4; ++j) sum[j].add(origin + place[k][i + j]);
        for (int j = 0; j < 4; ++j) {
          if (k0 > 0) sum[j].add(target + j * R::lanes);
          sum[j].write(target + j * R::lanes);
        }
      }
    }
  }
}

// grad = x * factor[0] * level * factor[1]
template <typename Type>
void store_gradient(const Array& features, const Array& out, const Box& box, int64_t ahead, const Item& item,
                    const double (*factor)[2], const typename Type::Acc* levels, bool streaming) {
  using R = Row<Type>;
  using Acc = typename R::Acc;
  using Store = typename Type::Store;
  alignas(64) Acc lines[R::lanes * kLine<Type>];
  rows_to_lines<Type>(box.shape->count, levels, lines);
  const int run = box.shape->run;
  streaming = streaming && (run * sizeof(Store) % kRowBytes == 0 || run * sizeof(Store) >= 8 * kRowBytes);  // whole lines
  for (int lane = 0; lane < R::lanes && item.first + lane < item.batch; ++lane) {
    const Acc first = static_cast<Acc>(factor[lane][0]), second = static_cast<Acc>(factor[lane][1]);
    for_each_run(box, features.stride, out.stride, [&](int p, int64_t from, int64_t to) __attribute__((always_inline)) {
      const Store* x = static_cast<const Store*>(features.data) + (item.first + lane) * features.batch_stride + from;
      Store* grad = static_cast<Store*>(out.data) + (item.first + lane) * out.batch_stride + to;
      const Acc* line = lines + lane * kLine<Type> + p;
      const bool aligned = streaming && reinterpret_cast<uintptr_t>(grad) % kVectorBytes == 0;
      int i = 0;
      for (; i + R::width <= run; i += R::width) {
        __builtin_prefetch(x + i + ahead, 0, 2);
        const auto value = load(Type{}, x + i) * first * (load_bits<typename R::Vec>(line + i) * second);
        if (aligned)
          stream(Type{}, grad + i, value);
        else
          store(Type{}, grad + i, value);
      }
      for (; i < run; ++i) store_one(Type{}, grad + i, load_one(Type{}, x + i) * first * (line[i] * second));
    });
  }
}

template <typename Type>
void gradient(const Grid& grid, const Array& features, const Array& out, const Item& item, const double (*factor)[2],
              const char* rows) {
  alignas(64) typename Type::Acc levels[kBox * Row<Type>::lanes];
  const bool streaming = item.batch * grid.length[0] * grid.length[1] * grid.length[2] * sizeof(typename Type::Store) > kStreamBytes;
  for (int64_t b = item.begin; b < item.end; ++b) {
    const Box box = find_box(grid, b);
    gather_levels<Type>(grid, box, rows, levels);
    store_gradient<Type>(features, out, box, to_next(grid, box, b, item, features), item, factor, levels, streaming);
  }
  if (streaming) end_stream();
}

}  // namespace

void histogram_boxes(const Grid& grid, Feature type, const Array& features, const Item& item, const double* scale, void* rows,
                     const int64_t* offset) {
  char* target = static_cast<char*>(rows);
  if (type == Feature::float32) sum_boxes<Float32>(grid, features, item, scale, target, offset);
  if (type == Feature::float64) sum_boxes<Float64>(grid, features, item, scale, target, offset);
  if (type == Feature::float16) sum_boxes<Float16>(grid, features, item, scale, target, offset);
  if (type == Feature::bfloat16) sum_boxes<BFloat16>(grid, features, item, scale, target, offset);
}

void histogram_total(bool wide, int64_t count, const void* rows, double* sum) {
  if (wide) return total<Float64>(count, static_cast<const double*>(rows), sum);
  total<Float32>(count, static_cast<const float*>(rows), sum);
}

void histogram_finish(bool wide, int64_t bins, int parts, const void* const* rows, const int64_t (*range)[2],
                      const double* factor, int lanes, void* out, int64_t out_stride) {
  if (wide) return finish<Float64>(bins, parts, rows, range, factor, lanes, static_cast<double*>(out), out_stride);
  finish<Float32>(bins, parts, rows, range, factor, lanes, static_cast<float*>(out), out_stride);
}

void histogram_levels(bool wide, int64_t bins, const void* grad, const void* attention, int64_t stride, int lanes, void* rows) {
  if (wide)
    return center_levels<Float64>(bins, static_cast<const double*>(grad), static_cast<const double*>(attention), stride, lanes,
                                  static_cast<double*>(rows));
  center_levels<Float32>(bins, static_cast<const float*>(grad), static_cast<const float*>(attention), stride, lanes,
                         static_cast<float*>(rows));
}

void histogram_gradient(const Grid& grid, Feature type, const Array& features, const Array& out, const Item& item,
                        const double (*factor)[2], const void* rows) {
  const char* source = static_cast<const char*>(rows);
  if (type == Feature::float32) gradient<Float32>(grid, features, out, item, factor, source);
  if (type == Feature::float64) gradient<Float64>(grid, features, out, item, factor, source);
  if (type == Feature::float16) gradient<Float16>(grid, features, out, item, factor, source);
  if (type == Feature::bfloat16) gradient<BFloat16>(grid, features, out, item, factor, source);
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
