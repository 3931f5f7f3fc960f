// Checks on NumPy arguments that every binding shares. Messages name the argument, what was expected and what was got.
#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

namespace add_ops {

namespace py = pybind11;

// An argument's dtype; bfloat16, which NumPy lacks, arrives as its bits in uint16.
enum class Dtype { float32, float64, float16, bfloat16, int16, int32, int64, other };

inline Dtype dtype_of(const py::array& array) {
  const char kind = array.dtype().kind();
  const auto size = array.itemsize();
  if (kind == 'f')
    return size == 4 ? Dtype::float32 : size == 8 ? Dtype::float64 : size == 2 ? Dtype::float16 : Dtype::other;
  if (kind == 'i') return size == 2 ? Dtype::int16 : size == 4 ? Dtype::int32 : size == 8 ? Dtype::int64 : Dtype::other;
  return kind == 'u' && size == 2 ? Dtype::bfloat16 : Dtype::other;
}

inline void require_dtype(const py::array& array, const char* name, std::initializer_list<Dtype> allowed,
                          const char* expected) {
  for (Dtype dtype : allowed)
    if (dtype_of(array) == dtype) return;
  throw py::type_error(std::string(name) + ": expected " + expected + ", got " +
                       py::str(array.dtype()).cast<std::string>());
}

inline void require_same_dtype(const py::array& array, const char* name, const py::array& model, const char* of) {
  if (dtype_of(array) != dtype_of(model)) throw py::type_error(std::string(name) + ": expected the dtype of " + of);
}

// Numbers of an array of float64, where `wide`, or float32.
inline double number_at(const void* numbers, int64_t at, bool wide) {
  return wide ? static_cast<const double*>(numbers)[at] : static_cast<const float*>(numbers)[at];
}
inline void set_number(void* numbers, int64_t at, bool wide, double value) {
  if (wide)
    static_cast<double*>(numbers)[at] = value;
  else
    static_cast<float*>(numbers)[at] = static_cast<float>(value);
}

// An entry of -1 in `shape` accepts any length.
inline void require_shape(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape) {
  bool good = array.ndim() == static_cast<py::ssize_t>(shape.size());
  for (size_t i = 0; good && i < shape.size(); ++i)
    good = shape[i] == -1 || shape[i] == array.shape(static_cast<py::ssize_t>(i));
  if (good) return;
  const auto text = [](const py::ssize_t* lengths, size_t count) {
    std::string out = "(";
    for (size_t i = 0; i < count; ++i)
      out += (i ? ", " : "") + (lengths[i] < 0 ? std::string("*") : std::to_string(lengths[i]));
    return out + ")";
  };
  throw py::value_error(std::string(name) + ": expected shape " + text(shape.data(), shape.size()) + ", got " +
                        text(array.shape(), static_cast<size_t>(array.ndim())));
}

inline void require_aligned(const py::array& array, const char* name) {
  if (!(array.flags() & py::detail::npy_api::NPY_ARRAY_ALIGNED_))
    throw py::value_error(std::string(name) + ": expected elements at addresses that are multiples of their size");
}

inline void require_contiguous(const py::array& array, const char* name) {
  require_aligned(array, name);
  if (!(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + ": expected a C-contiguous array");
}

inline void require_writeable(const py::array& array, const char* name) {
  if (!array.writeable()) throw py::value_error(std::string(name) + ": expected a writeable array");
}

// Whether all of these `count` places, of int16 or int32, lie in [0, count).
template <typename Index>
bool all_inside(const Index* places, int64_t count) {
  std::make_unsigned_t<Index> largest = 0;  // a negative place is a large one
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<std::make_unsigned_t<Index>>(places[i]));
  return largest < count;
}

[[noreturn]] inline void throw_outside(const char* name, int64_t count) {
  throw py::value_error(std::string(name) + ": expected a permutation of 0 to " + std::to_string(count - 1) +
                        " in each row");
}

}  // namespace add_ops
