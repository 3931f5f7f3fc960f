// contrastive_loss: the distances of all pairs of rows of a batch, view by view, summed as their labels say.
#include "contrastive_loss.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "arrays.h"
#include "parallel.h"
#include "scratch.h"

namespace add_ops {
namespace {

struct Problem {
  bool wide, squared;
  int64_t batch, views, length;
  const char *student, *teacher;
  const int64_t* labels;
  double gamma, eta, margin;

  int64_t row_bytes() const { return length * (wide ? 8 : 4); }
  int64_t padded_bytes() const { return (row_bytes() + kLineBytes - 1) / kLineBytes * kLineBytes; }
  int64_t items() const { return (batch + kItemRows - 1) / kItemRows; }  // of a view
  bool padded() const { return padded_bytes() != row_bytes(); }
};

// The rows (batch, views, length) of an array where they are, or in memory of its own for rows that end in whole lines.
struct Rows {
  Scratch copy;
  char* data;
  int64_t view_step, stride;  // in bytes

  Rows(const Problem& p, char* values)
      : copy(p.padded() ? new Line[p.batch * p.views * p.padded_bytes() / kLineBytes] : nullptr),
        data(copy ? copy[0].bytes : values),
        view_step(copy ? p.batch * p.padded_bytes() : p.row_bytes()),
        stride(copy ? p.padded_bytes() : p.views * p.row_bytes()) {}

  char* row(int64_t view, int64_t sample) const { return data + view * view_step + sample * stride; }
};

Rows read(const Problem& p, const char* values, int threads) {
  Rows rows(p, const_cast<char*>(values));
  if (!p.padded()) return rows;
  parallel_for(p.views, threads, [&](int64_t k, int) {
    for (int64_t b = 0; b < p.batch; ++b) {
      char* to = rows.row(k, b);
      std::memcpy(to, values + (b * p.views + k) * p.row_bytes(), static_cast<size_t>(p.row_bytes()));
      std::memset(to + p.row_bytes(), 0, static_cast<size_t>(p.padded_bytes() - p.row_bytes()));
    }
  });
  return rows;
}

// Calls body(pairs of the view, view, first row, last row, item) for all student rows of all views.
template <typename Body>
void for_rows(const Problem& p, double factor, int threads, const Body& body) {
  const Rows student = read(p, p.student, threads), teacher = read(p, p.teacher, threads);
  double equal = 0;
  for (int64_t i = 0; i < p.batch; ++i) equal += std::count(p.labels, p.labels + p.batch, p.labels[i]);
  const double all = static_cast<double>(p.batch * p.batch), views = static_cast<double>(p.views),
               each = 2 * factor * p.eta / views;
  const int item_size = p.wide ? 8 : 4;
  parallel_for(p.views * p.items(), threads, [&](int64_t item, int) {
    const int64_t k = item / p.items(), first = item % p.items() * kItemRows;
    const Pairs pairs{p.wide,
                      p.squared,
                      p.batch,
                      p.padded_bytes() / item_size,
                      student.stride / item_size,
                      student.row(k, 0),
                      teacher.row(k, 0),
                      p.labels,
                      factor * p.gamma / (views * static_cast<double>(p.batch)) + each / equal,
                      each / equal,
                      all > equal ? each / (all - equal) : 0,
                      p.margin};
    body(pairs, k, first, std::min(first + kItemRows, p.batch), item);
  });
}

Problem read_problem(const py::array& student, const py::array& teacher, const py::array& labels, double p,
                     double gamma, double eta, double margin) {
  require_dtype(student, "student", {Dtype::float32, Dtype::float64}, "float32 or float64");
  require_shape(student, "student", {-1, -1, -1});
  require_contiguous(student, "student");
  require_same_dtype(teacher, "teacher", student, "the student");
  require_shape(teacher, "teacher", {student.shape(0), student.shape(1), student.shape(2)});
  require_contiguous(teacher, "teacher");
  require_dtype(labels, "labels", {Dtype::int64}, "int64");
  require_shape(labels, "labels", {student.shape(0)});
  require_contiguous(labels, "labels");
  if (p != 1 && p != 2) throw py::value_error("p: expected 1 or 2, got " + std::to_string(p));
  return {dtype_of(student) == Dtype::float64,
          p == 2,
          student.shape(0),
          student.shape(1),
          student.shape(2),
          static_cast<const char*>(student.data()),
          static_cast<const char*>(teacher.data()),
          static_cast<const int64_t*>(labels.data()),
          gamma,
          eta,
          margin};
}

void require_scalar(const py::array& array, const py::array& student, const char* name) {
  require_same_dtype(array, name, student, "the student");
  require_shape(array, name, {});
  require_aligned(array, name);
}

void forward(const py::array& student, const py::array& teacher, const py::array& labels, double p, double gamma,
             double eta, double margin, py::array out, int threads) {
  const Problem problem = read_problem(student, teacher, labels, p, gamma, eta, margin);
  require_scalar(out, student, "out");
  void* to = out.mutable_data();
  const py::gil_scoped_release release;
  std::vector<double> sums(problem.views * problem.items());
  const auto rows = ADD_OPS_KERNEL(contrastive_rows);
  for_rows(problem, 1, threads, [&](const Pairs& pairs, int64_t, int64_t first, int64_t last, int64_t item) {
    sums[item] = rows(pairs, first, last);
  });
  double sum = 0;
  for (double of_item : sums) sum += of_item;
  set_number(to, 0, problem.wide, sum);
}

void backward(const py::array& grad, const py::array& student, const py::array& teacher, const py::array& labels,
              double p, double gamma, double eta, double margin, py::array out, int threads) {
  const Problem problem = read_problem(student, teacher, labels, p, gamma, eta, margin);
  require_scalar(grad, student, "grad");
  require_same_dtype(out, "out", student, "the student");
  require_shape(out, "out", {student.shape(0), student.shape(1), student.shape(2)});
  require_contiguous(out, "out");
  const double factor = number_at(grad.data(), 0, problem.wide);
  char* to = static_cast<char*>(out.mutable_data());
  const py::gil_scoped_release release;
  const auto rows = ADD_OPS_KERNEL(contrastive_rows_backward);
  const Rows gradient(problem, to);
  for_rows(problem, factor, threads, [&](const Pairs& pairs, int64_t k, int64_t first, int64_t last, int64_t) {
    for (int64_t b = first; b < last; ++b)
      std::memset(gradient.row(k, b), 0, static_cast<size_t>(problem.padded_bytes()));
    rows(pairs, first, last, gradient.row(k, 0));
    for (int64_t b = first; b < last && problem.padded(); ++b)
      std::memcpy(to + (b * problem.views + k) * problem.row_bytes(), gradient.row(k, b),
                  static_cast<size_t>(problem.row_bytes()));
  });
}

}  // namespace

void bind_contrastive_loss(py::module_& m) {
  m.def("contrastive_loss", &forward, py::arg("student"), py::arg("teacher"), py::arg("labels"), py::arg("p"),
        py::arg("gamma"), py::arg("eta"), py::arg("margin"), py::arg("out"), py::arg("threads"),
        "out () = the loss of all pairs of student and teacher (B, K, M) with labels (B,); p is 1 or 2.");
  m.def("contrastive_loss_backward", &backward, py::arg("grad"), py::arg("student"), py::arg("teacher"),
        py::arg("labels"), py::arg("p"), py::arg("gamma"), py::arg("eta"), py::arg("margin"), py::arg("out"),
        py::arg("threads"), "out (B, K, M) = gradient of the student for grad ().");
}

}  // namespace add_ops
