// What the files of bindings share: reading tuples, and turning a status into an exception.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "level_update.h"
#include "memory.h"

namespace hope::bindings {

namespace py = pybind11;

inline int64_t integer(PyObject* object) {
  const long long value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline void* address(PyObject* object) {
  if (object == Py_None) return nullptr;
  void* value = PyLong_AsVoidPtr(object);
  if (!value && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// Borrowed items of a tuple, taken one after the other.
class Items {
 public:
  Items(PyObject* tuple, const char* name, Py_ssize_t count = -1) : tuple_(tuple) {
    if (!PyTuple_Check(tuple) || (count >= 0 && PyTuple_GET_SIZE(tuple) != count))
      throw py::type_error(std::string(name) + " is not a tuple of the size the core expects");
    size_ = PyTuple_GET_SIZE(tuple);
  }
  PyObject* next() {
    if (position_ >= size_) throw py::type_error("a tuple is shorter than the core expects");
    return PyTuple_GET_ITEM(tuple_, position_++);
  }
  int64_t number() { return integer(next()); }
  float real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return float(value);
  }
  void* pointer() { return address(next()); }
  TokenView tokens() {
    PyObject* object = next();
    TokenView view;
    if (object == Py_None) return view;
    Items items(object, "a token tensor", 4);
    view.data = items.pointer();
    view.row = items.number();
    view.token = items.number();
    view.head = items.number();
    return view;
  }
  MatrixView matrix() {
    PyObject* object = next();
    MatrixView view;
    if (object == Py_None) return view;
    Items items(object, "a matrix tensor", 6);
    view.data = items.pointer();
    view.dtype = static_cast<hope::DType>(items.number());
    view.sequence = items.number();
    view.head = items.number();
    view.in = items.number();
    view.out = items.number();
    return view;
  }
  void matrices(MatrixView* views, const char* name) {
    Items items(next(), name);
    if (items.size_ > hope::kMaxWeights) throw py::type_error(std::string(name) + " has too many matrices");
    for (Py_ssize_t i = 0; i < items.size_; ++i) views[i] = items.matrix();
  }
  hope::SegmentMemory segment() {
    PyObject* object = next();
    hope::SegmentMemory memory;
    if (object == Py_None) return memory;
    Items items(object, "a segment", 2);
    memory.data = items.pointer();
    memory.bytes = items.number();
    return memory;
  }
  template <class Pointer>
  void pointers(Pointer* found, const char* name) {
    Items items(next(), name);
    if (items.size_ > hope::kMaxWeights) throw py::type_error(std::string(name) + " has too many matrices");
    for (Py_ssize_t i = 0; i < items.size_; ++i) found[i] = static_cast<Pointer>(items.pointer());
  }

 private:
  PyObject* tuple_;
  Py_ssize_t size_, position_ = 0;
};

inline void raise(const hope::Status& status) {
  switch (status.code) {
    case hope::StatusCode::ok: return;
    case hope::StatusCode::invalid_argument: throw py::value_error(status.message);
    case hope::StatusCode::out_of_memory: throw std::bad_alloc();
    case hope::StatusCode::unsupported:
    case hope::StatusCode::device_error: throw std::runtime_error(status.message);
  }
}

// An update's tables, from one tuple per tensor (addresses or None of parameter, gradient, accumulator, first, second, copy;
// elements, level, dtypes of gradient and copy, decay) and one per level (rule, due, nesterov, lr, beta1, beta2, eps,
// gain1, gain2, correction1, correction2, scale, max_norm).
class UpdateTables {
 public:
  UpdateTables(const py::tuple& tensors, const py::tuple& levels) {
    Items l(levels.ptr(), "levels");
    for (size_t i = 0; i < levels.size(); ++i) {
      Items items(l.next(), "a level", 13);
      UpdateLevel level{};
      level.rule = static_cast<UpdateRule>(items.number());
      level.due = static_cast<int32_t>(items.number());
      level.nesterov = static_cast<int32_t>(items.number());
      for (float UpdateLevel::*field :
           {&UpdateLevel::lr, &UpdateLevel::beta1, &UpdateLevel::beta2, &UpdateLevel::eps, &UpdateLevel::gain1,
            &UpdateLevel::gain2, &UpdateLevel::correction1,
            &UpdateLevel::correction2, &UpdateLevel::scale, &UpdateLevel::max_norm})
        level.*field = items.real();
      levels_.push_back(level);
    }
    Items t(tensors.ptr(), "tensors");
    int64_t piece = 0;
    size_t level = 0;
    // The levels before the one a tensor belongs to have all their tensors behind them.
    const auto start_levels = [&](size_t until) {
      for (; level < until && level < levels_.size(); ++level) levels_[level].first_piece = piece;
    };
    for (size_t i = 0; i < tensors.size(); ++i) {
      Items items(t.next(), "a tensor", 11);
      UpdateTensor tensor{};
      tensor.parameter = static_cast<float*>(items.pointer());
      tensor.gradient = items.pointer();
      tensor.accumulator = static_cast<float*>(items.pointer());
      tensor.first = static_cast<float*>(items.pointer());
      tensor.second = static_cast<float*>(items.pointer());
      tensor.copy = items.pointer();
      tensor.size = items.number();
      tensor.level = static_cast<int32_t>(items.number());
      tensor.gradient_dtype = static_cast<DType>(items.number());
      tensor.copy_dtype = static_cast<DType>(items.number());
      tensor.decay = items.real();
      tensor.first_piece = piece;
      if (tensor.level >= 0) start_levels(size_t(tensor.level) + 1);
      const int64_t pieces = piece_count(tensor.size);
      piece += pieces;
      if (tensor.level >= 0 && size_t(tensor.level) < levels_.size()) levels_[size_t(tensor.level)].pieces += pieces;
      tensors_.push_back(tensor);
    }
    start_levels(levels_.size());
  }
  LevelUpdateProblem problem(float weight, float max_norm, int64_t norms) const {
    return {tensors_.data(), levels_.data(), int64_t(tensors_.size()), int64_t(levels_.size()), weight, max_norm,
            reinterpret_cast<float*>(norms)};
  }

 private:
  std::vector<UpdateTensor> tensors_;
  std::vector<UpdateLevel> levels_;
};

// Adds what was compiled with nvcc.
void add_cuda(py::module_& m);

}  // namespace hope::bindings
