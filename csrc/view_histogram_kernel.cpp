// The inner loops of view_histogram. Compiled once per instruction set; see view_histogram.h for the layout.
#include "view_histogram_rows.h"

namespace add_ops {
namespace ADD_OPS_ISA {
namespace {

// squares[1 + position] = (x * scale)^2, a row per position; squares[0] is zero.
template <typename E>
void load_squares(const Box& box, const Samples<E>& features, const Acc<E>* scale, Acc<E>* squares) {
  using R = Row<E>;
  for_each_square<E>(box, features, nullptr,
                     [&](int p, const E* x, const int64_t* lane, E*, const int64_t*) __attribute__((always_inline)) {
    for (int part = 0; part < R::parts; ++part) {
      Vec<Acc<E>> square[R::width];
      ADD_OPS_UNROLL
      for (int i = 0; i < R::width; ++i) {
        square[i] = load_as<Acc<E>>(x + lane[part * R::width + i]) * scale[part * R::width + i];
        square[i] *= square[i];
      }
      transpose<Acc<E>>(square);
      ADD_OPS_UNROLL
      for (int i = 0; i < R::width; ++i) store(squares + (1 + p + i) * R::lanes + part * R::width, square[i]);
    }
  });
}

BoxStart box_start(const Grid& grid, const View& view, const BoxTable& table, const Box& box) {
  BoxStart s;
  s.numerator = (view.base + table.lowest_corner + view.step[0] * box.start[0] + view.step[1] * box.start[1] +
                 view.step[2] * box.start[2]) *
                grid.bins;
  s.bin = s.numerator / view.divisor;
  s.rest_in_bins =
      static_cast<uint32_t>(static_cast<double>(s.numerator - s.bin * view.divisor) * view.to_fixed_point) +
      kFixedPointError;
  return s;
}
ADD_OPS_INLINE int64_t exact_bin(const Grid& grid, const View& view, const BoxStart& start, int64_t distance) {
  return (start.numerator + distance * grid.bins) / view.divisor;
}

// How the sorted positions of a box fall into bins: those before end[0] lie in bin[0], those before end[1] in bin[1] …
constexpr int kEndsAtOnce = 8;
constexpr uint64_t kTopBit = uint64_t{1} << 63;
struct Segments {
  int count, end[kBox + kEndsAtOnce];
  int64_t bin[kBox];
};

// Bit i of `cuts`: position i + 1 lies in a later bin than position i. Of each place, distance_in_bins[i] +
// rest_in_bins, the units are 0 to 2·kFixedPointError too many. False where a place is so near the edge of a bin that
// its bin is not sure, which is rare.
bool find_cuts(const Grid& grid, const BoxTable& table, uint32_t rest_in_bins, int count, uint64_t* cuts) {
  constexpr int width = vector_bytes / sizeof(uint32_t);
  const uint32_t fraction = (uint32_t{1} << grid.fraction_bits) - 1;
  Mask least_fraction = Mask{} - 1;
  for (int first = 0; first < count; first += 64) {
    uint64_t word = 0;
    ADD_OPS_UNROLL
    for (int i = 0; i < 64; i += width) {
      const Mask here = load<Mask>(table.distance_in_bins + first + i) + rest_in_bins;
      const Mask next = load<Mask>(table.distance_in_bins + first + i + 1) + rest_in_bins;
      word |= static_cast<uint64_t>(lane_bits((Mask)(((here ^ next) & ~fraction) != 0))) << i;
      const Mask here_fraction = here & fraction;
      least_fraction = here_fraction < least_fraction ? here_fraction : least_fraction;
    }
    cuts[first / 64] = word;
  }
  return lane_bits((Mask)(least_fraction <= 2 * kFixedPointError)) == 0;
}

void cut_into_bins(const Grid& grid, const View& view, const BoxTable& table, const Box& box, Segments& segments) {
  const BoxStart start = box_start(grid, view, table, box);
  const int count = box.shape->count;
  uint64_t cuts[kBox / 64];
  const bool divide = view.always_divide || !find_cuts(grid, table, start.rest_in_bins, count, cuts);
  if (divide) {
    std::memset(cuts, 0, sizeof cuts);
    for (int i = 0; i + 1 < count; ++i)
      if (exact_bin(grid, view, start, table.distance[i]) != exact_bin(grid, view, start, table.distance[i + 1]))
        cuts[i / 64] |= uint64_t{1} << i % 64;
  }
  const uint64_t last = uint64_t{1} << (count - 1) % 64;
  cuts[(count - 1) / 64] = (cuts[(count - 1) / 64] & (last - 1)) | last;

  int used = 0;
  for (int word = 0; word * 64 < count; ++word) {
    uint64_t rest = cuts[word];
    const int next = used + __builtin_popcountll(rest);
    for (; used < next; used += kEndsAtOnce) {  // more than needed: a loop whose end can be foreseen
      ADD_OPS_UNROLL
      for (int i = 0; i < kEndsAtOnce; ++i, rest &= rest - 1)
        segments.end[used + i] = word * 64 + __builtin_ctzll(rest | kTopBit) + 1;
    }
    used = next;
  }
  for (int s = 0; s < used; ++s) {
    const int i = segments.end[s] - 1;
    segments.bin[s] = divide ? exact_bin(grid, view, start, table.distance[i])
                             : start.bin + ((table.distance_in_bins[i] + start.rest_in_bins) >> grid.fraction_bits);
  }
  segments.count = used;
}

// Masks that keep the first n of eight 16-bit offsets; the others become 0, the offset of the row of zeros.
constexpr uint64_t kAllFour = ~uint64_t{0};
constexpr uint64_t kFirstOffsets[8][2] = {
    {0, 0},        {kAllFour >> 48, 0},        {kAllFour >> 32, 0},        {kAllFour >> 16, 0},
    {kAllFour, 0}, {kAllFour, kAllFour >> 48}, {kAllFour, kAllFour >> 32}, {kAllFour, kAllFour >> 16}};

template <typename R>
ADD_OPS_INLINE void add_rows(R& even, R& odd, const char* source, const uint16_t* row, uint64_t first_four,
                             uint64_t last_four) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first offset is the lowest");
  uint64_t four[2];  // offsets at once: loads are what bounds this loop
  std::memcpy(four, row, sizeof four);
  four[0] &= first_four;
  four[1] &= last_four;
  ADD_OPS_UNROLL
  for (int i = 0; i < 4; ++i) {
    even.add(source + (four[0] >> 16 * i & 0xffff));
    odd.add(source + (four[1] >> 16 * i & 0xffff));
  }
}

template <typename E>
void sum_boxes(const Grid& grid, const Array& array, const Item& item, const double* scale, char* rows,
               const int64_t* offset) {
  using R = Row<E>;
  alignas(64) Acc<E> squares[(1 + kBox + R::width) * R::lanes] = {};
  const char* source = reinterpret_cast<const char*>(squares);
  Segments segments;
  Acc<E> factor[R::lanes];
  for (int lane = 0; lane < R::lanes; ++lane) factor[lane] = static_cast<Acc<E>>(scale[lane]);
  const Samples<E> features(array, item);
  read_in_order(grid, item, features);
  for (int64_t b = item.begin; b < item.end; ++b) {
    const Box box = find_box(grid, b);
    load_squares<E>(box, features, factor, squares);
    for (int k = 0; k < grid.views; ++k) {
      const BoxTable& table = box.table[k];
      cut_into_bins(grid, grid.view[k], table, box, segments);
      char* view_rows = rows + offset[k] * kRowBytes;
      for (int s = 0, i = 0; s < segments.count; ++s) {
        const int end = segments.end[s];
        R even{}, odd{};  // from zero, so that long sums round little
        for (; i + 8 <= end; i += 8) add_rows(even, odd, source, table.row + i, ~uint64_t{0}, ~uint64_t{0});
        add_rows(even, odd, source, table.row + i, kFirstOffsets[end - i][0], kFirstOffsets[end - i][1]);
        i = end;
        for (int part = 0; part < R::parts; ++part) even.part[part] += odd.part[part];
        char* target = view_rows + segments.bin[s] * kRowBytes;
        even.add(target);
        even.write(target);
      }
    }
  }
}

template <typename E>
void total(int64_t count, const Acc<E>* rows, double* sum) {
  WideRow<E> lanes{};
  for (int64_t j = 0; j < count; ++j) lanes.add(rows + j * Row<E>::lanes);
  std::memcpy(sum, &lanes, sizeof lanes);
}

template <typename E>
void finish(int64_t bins, int parts, const void* const* rows, const int64_t (*range)[2], const double* factor,
            int lanes, Acc<E>* out, int64_t out_stride) {
  using R = Row<E>;
  using W = WideRow<E>;
  constexpr int height = 32;
  alignas(64) Acc<E> tile[height * R::lanes], lines[R::lanes * kLine<E>];
  for (int64_t first = 0; first < bins; first += height) {
    const int64_t last = first + height < bins ? first + height : bins;
    int near[kItems], count = 0;  // the parts that hold any of these bins
    for (int c = 0; c < parts; ++c)
      if (range[c][0] < last && range[c][1] > first) near[count++] = c;
    for (int64_t j = first; j < last; ++j) {
      W sum{};
      for (int i = 0; i < count; ++i) {
        const int c = near[i];
        if (j >= range[c][0] && j < range[c][1])
          sum.add(static_cast<const Acc<E>*>(rows[c]) + (j - range[c][0]) * R::lanes);
      }
      for (int i = 0; i < W::parts; ++i)
        store_as<double>(tile + (j - first) * R::lanes + i * W::width,
                         sum.part[i] * load<Vec<double>>(factor + i * W::width));
    }
    transpose_positions<E, false>(static_cast<int>(last - first), tile, lines);
    for (int lane = 0; lane < lanes; ++lane)
      std::memcpy(out + lane * out_stride + first, lines + lane * kLine<E>, (last - first) * sizeof(Acc<E>));
  }
}

template <typename E>
void centre_gradient(int64_t bins, const Acc<E>* grad, const Acc<E>* attention, int64_t stride, int lanes,
                     Acc<E>* rows) {
  using R = Row<E>;
  constexpr int width = WideRow<E>::width;
  Acc<E> mean[R::lanes] = {};
  for (int lane = 0; lane < lanes; ++lane) {
    const Acc<E>* g = grad + lane * stride;
    const Acc<E>* a = attention + lane * stride;
    Vec<double> even{}, odd{};
    int64_t j = 0;
    for (; j + 2 * width <= bins; j += 2 * width) {
      even += load_as<double>(g + j) * load_as<double>(a + j);
      odd += load_as<double>(g + j + width) * load_as<double>(a + j + width);
    }
    double total = 0;
    for (; j < bins; ++j) total += static_cast<double>(g[j]) * static_cast<double>(a[j]);
    for (int i = 0; i < width; ++i) total += even[i] + odd[i];
    mean[lane] = static_cast<Acc<E>>(total);
  }
  alignas(64) Acc<E> lines[R::lanes * kLine<E>] = {}, tile[kBox * R::lanes];
  for (int64_t first = 0; first < bins; first += kBox) {
    const int count = static_cast<int>(first + kBox < bins ? kBox : bins - first);
    for (int lane = 0; lane < lanes; ++lane)
      for (int j = 0; j < count; ++j) lines[lane * kLine<E> + j] = grad[lane * stride + first + j] - mean[lane];
    transpose_positions<E, true>(count, lines, tile);
    std::memcpy(rows + first * R::lanes, tile, count * kRowBytes);
  }
}

constexpr size_t kStreamBytes = 16 << 20;  // gradients larger than this bypass the caches

// grad = x * factor[0] * (sum over the views of the centred gradient of the position's bin) * factor[1]
template <typename E>
void gradient(const Grid& grid, const Array& array, const Array& out_array, const Item& item, const double (*factor)[2],
              const char* rows, BoxStart* start) {
  using R = Row<E>;
  const bool streaming = item.batch * grid.length[0] * grid.length[1] * grid.length[2] * sizeof(E) > kStreamBytes;
  const uint32_t fraction = (uint32_t{1} << grid.fraction_bits) - 1;
  const Samples<E> features(array, item), out(out_array, item);
  Acc<E> first[R::lanes], second[R::lanes];
  for (int i = 0; i < R::lanes; ++i)
    first[i] = static_cast<Acc<E>>(factor[i][0]), second[i] = static_cast<Acc<E>>(factor[i][1]);
  for (int64_t b = item.begin; b < item.end; ++b) {
    const Box box = find_box(grid, b);
    for (int k = 0; k < grid.views; ++k) start[k] = box_start(grid, grid.view[k], box.table[k], box);
    for_each_square<E>(box, features, &out,
                       [&](int p, const E* x, const int64_t* x_lane, E* y, const int64_t* y_lane)
                           __attribute__((always_inline)) {
      for (int part = 0; part < R::parts; ++part) {
        Vec<Acc<E>> sum[R::width] = {};
        for (int k = 0; k < grid.views; ++k) {
          const BoxTable& table = box.table[k];
          const char* origin = rows + (k * grid.bins + start[k].bin) * kRowBytes + part * vector_bytes;
          uint32_t offset[kRowBytes / sizeof(uint32_t)];  // in bytes, of the rows of the positions' bins
          uint32_t near_edge = grid.view[k].always_divide;
          const Mask place = load<Mask>(table.distance_in_bins + p) + start[k].rest_in_bins;
          near_edge |= lane_bits((Mask)((place & fraction) <= 2 * kFixedPointError));
          store(offset, (place >> grid.fraction_bits) * kRowBytes);
          if (__builtin_expect(near_edge, 0))
            for (int i = 0; i < R::width; ++i)
              offset[i] = static_cast<uint32_t>(
                  (exact_bin(grid, grid.view[k], start[k], table.distance[p + i]) - start[k].bin) * kRowBytes);
          ADD_OPS_UNROLL
          for (int i = 0; i < R::width; i += 2) {
            uint64_t two;  // offsets at once, as in add_rows
            std::memcpy(&two, offset + i, sizeof two);
            sum[i] += load<Vec<Acc<E>>>(origin + (two & 0xffffffff));
            sum[i + 1] += load<Vec<Acc<E>>>(origin + (two >> 32));
          }
        }
        transpose<Acc<E>>(sum);
        ADD_OPS_UNROLL
        for (int i = 0; i < R::width; ++i) {
          const int lane = part * R::width + i;
          if (lane >= out.count) break;
          const Vec<Acc<E>> value = load_as<Acc<E>>(x + x_lane[lane]) * first[lane] * (sum[i] * second[lane]);
          E* target = y + y_lane[lane];
          if (sizeof(E) == sizeof(Acc<E>) && streaming && reinterpret_cast<uintptr_t>(target) % vector_bytes == 0)
            stream(target, value);
          else
            store_as<Acc<E>>(target, value);
        }
      }
    });
  }
  if (streaming) fence_streams();
}

}  // namespace

void histogram_boxes(const Grid& grid, Feature type, const Array& features, const Item& item, const double* scale,
                     void* rows, const int64_t* offset) {
  char* target = static_cast<char*>(rows);
  if (type == Feature::float32) sum_boxes<float>(grid, features, item, scale, target, offset);
  if (type == Feature::float64) sum_boxes<double>(grid, features, item, scale, target, offset);
  if (type == Feature::float16) sum_boxes<Half>(grid, features, item, scale, target, offset);
  if (type == Feature::bfloat16) sum_boxes<Bfloat>(grid, features, item, scale, target, offset);
}

void histogram_total(bool wide, int64_t count, const void* rows, double* sum) {
  if (wide) return total<double>(count, static_cast<const double*>(rows), sum);
  total<float>(count, static_cast<const float*>(rows), sum);
}

void histogram_finish(bool wide, int64_t bins, int parts, const void* const* rows, const int64_t (*range)[2],
                      const double* factor, int lanes, void* out, int64_t out_stride) {
  if (wide) return finish<double>(bins, parts, rows, range, factor, lanes, static_cast<double*>(out), out_stride);
  finish<float>(bins, parts, rows, range, factor, lanes, static_cast<float*>(out), out_stride);
}

void histogram_centre(bool wide, int64_t bins, const void* grad, const void* attention, int64_t stride, int lanes,
                      void* rows) {
  if (wide)
    return centre_gradient<double>(bins, static_cast<const double*>(grad), static_cast<const double*>(attention),
                                   stride, lanes, static_cast<double*>(rows));
  centre_gradient<float>(bins, static_cast<const float*>(grad), static_cast<const float*>(attention), stride, lanes,
                         static_cast<float*>(rows));
}

void histogram_gradient(const Grid& grid, Feature type, const Array& features, const Array& out, const Item& item,
                        const double (*factor)[2], const void* rows, BoxStart* start) {
  const char* source = static_cast<const char*>(rows);
  if (type == Feature::float32) gradient<float>(grid, features, out, item, factor, source, start);
  if (type == Feature::float64) gradient<double>(grid, features, out, item, factor, source, start);
  if (type == Feature::float16) gradient<Half>(grid, features, out, item, factor, source, start);
  if (type == Feature::bfloat16) gradient<Bfloat>(grid, features, out, item, factor, source, start);
}

}  // namespace ADD_OPS_ISA
}  // namespace add_ops
