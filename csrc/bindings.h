// What the files of bindings share: reading tuples, and turning a status into an exception.
//
// A token tensor is None or (address, row stride, token stride, head stride); a matrix tensor is None or (address, dtype,
// sequence stride, head stride, in stride, out stride); strides count elements, dtypes are the numbers of hope::DType.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "factored.h"
#include "level_update.h"
#include "memory.h"
#include "step.h"

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
  double real() {
    const double value = PyFloat_AsDouble(next());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
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
  void pointers(Pointer* found, const char* name, Py_ssize_t most = hope::kMaxWeights) {
    Items items(next(), name);
    if (items.size_ > most) throw py::type_error(std::string(name) + " has too many matrices");
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

// None, or why an engine does not compute it.
inline py::object refusal(const Status& status) {
  if (status.code == StatusCode::unsupported) return py::str(status.message);
  raise(status);
  return py::none();
}

// A scan, from the tuples of hope_kernels/backends/core_problem.py.
inline ScanProblem read_problem(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens,
                                const py::tuple& coefficients, const py::tuple& states) {
  ScanProblem problem{};
  Items v(vocabulary.ptr(), "vocabulary", 6);
  problem.form = static_cast<Form>(v.number());
  problem.activation = static_cast<Activation>(v.number());
  problem.objective = static_cast<Objective>(v.number());
  problem.rule = static_cast<Rule>(v.number());
  problem.residual = static_cast<int32_t>(v.number());
  problem.dtype = static_cast<DType>(v.number());
  Items s(sizes.ptr(), "sizes", 12);
  problem.batch = s.number();
  problem.tokens = s.number();
  problem.heads = s.number();
  problem.dim = s.number();
  problem.hidden = s.number();
  problem.sequence_count = s.number();
  problem.pending_capacity = s.number();
  problem.chunk_size = s.number();
  problem.chunks = s.number();
  problem.first_chunk = s.number();
  problem.bptt_chunks = s.number();
  problem.checkpoint_interval = s.number();
  Items t(tokens.ptr(), "tokens", 5);
  problem.q = t.tokens();
  problem.k = t.tokens();
  problem.v = t.tokens();
  problem.pending_k = t.tokens();
  problem.pending_v = t.tokens();
  Items c(coefficients.ptr(), "coefficients", 6);
  problem.step = c.pointer();
  problem.retention = c.pointer();
  problem.decay = c.pointer();
  problem.momentum_step = c.pointer();
  problem.momentum_carry = c.pointer();
  problem.momentum_decay = c.pointer();
  Items w(states.ptr(), "states", 3);
  w.matrices(problem.weights, "weights");
  w.matrices(problem.momentum, "momentum");
  problem.sequences = static_cast<const Sequence*>(w.pointer());
  problem.threads = 1;
  return problem;
}

// Output, weights, momentum, weight checkpoints, momentum checkpoints, segment (None or address, bytes per task).
inline ForwardResult read_forward(const py::tuple& results) {
  ForwardResult result{};
  Items r(results.ptr(), "results", 6);
  result.output = r.tokens();
  r.pointers(result.weights, "final weights");
  r.pointers(result.momentum, "final momentum");
  r.pointers(result.checkpoints, "weight checkpoints");
  r.pointers(result.checkpoints + kMaxWeights, "momentum checkpoints");
  result.segment = r.segment();
  return result;
}

// given: weight checkpoints, momentum checkpoints, segment, grad_output, grad_weights, grad_momentum.
// results: q, k, v, pending_k, pending_v; the six coefficients; weights; momentum.
inline BackwardResult read_backward(const py::tuple& given, const py::tuple& results) {
  BackwardResult result{};
  Items g(given.ptr(), "given", 6);
  g.pointers(result.checkpoints, "weight checkpoints");
  g.pointers(result.checkpoints + kMaxWeights, "momentum checkpoints");
  result.segment = g.segment();
  result.grad_output = g.tokens();
  g.matrices(result.grad_weights, "grad_weights");
  g.matrices(result.grad_momentum, "grad_momentum");
  Items r(results.ptr(), "results", 13);
  result.q = r.tokens();
  result.k = r.tokens();
  result.v = r.tokens();
  result.pending_k = r.tokens();
  result.pending_v = r.tokens();
  result.step = r.pointer();
  result.retention = r.pointer();
  result.decay = r.pointer();
  result.momentum_step = r.pointer();
  result.momentum_carry = r.pointer();
  result.momentum_decay = r.pointer();
  r.pointers(result.weights, "weight gradients");
  r.pointers(result.momentum, "momentum gradients");
  return result;
}

// A chunk of the factored plan, from the tuples of hope_kernels/memory/factored_ops.py. Owns the table of blocks.
class FactoredTables {
 public:
  // sizes: batch, rows, heads, dim, hidden, whether the rows are written. memory: weights, their transposes, a, gamma, blocks,
  // kept (None or address, bytes for each task). A block: count, stride, turned stride, and six tuples of addresses.
  FactoredTables(const py::tuple& vocabulary, const py::tuple& sizes, const py::tuple& tokens, const py::tuple& memory,
                 int threads) {
    Items v(vocabulary.ptr(), "vocabulary", 6);
    chunk_.form = static_cast<Form>(v.number());
    chunk_.activation = static_cast<Activation>(v.number());
    chunk_.objective = static_cast<Objective>(v.number());
    v.number();  // the rule: gd
    chunk_.residual = static_cast<int32_t>(v.number());
    chunk_.dtype = static_cast<DType>(v.number());
    Items s(sizes.ptr(), "sizes", 6);
    chunk_.batch = s.number();
    chunk_.rows = s.number();
    chunk_.heads = s.number();
    chunk_.dim = s.number();
    chunk_.hidden = s.number();
    chunk_.writes = static_cast<int32_t>(s.number());
    chunk_.threads = threads;
    Items t(tokens.ptr(), "tokens", 2);
    chunk_.x = t.tokens();
    chunk_.target = t.tokens();
    Items m(memory.ptr(), "memory", 6);
    m.pointers(chunk_.weights, "weights");
    m.pointers(chunk_.turned_weights, "transposed weights");
    chunk_.scale = m.pointer();
    chunk_.decay = m.pointer();
    PyObject* blocks = m.next();
    Items b(blocks, "blocks");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(blocks); ++i) {
      Items items(b.next(), "a block", 9);
      PairBlock block{};
      block.count = items.number();
      block.stride = items.number();
      block.turned_stride = items.number();
      items.pointers(block.inputs, "inputs", kMaxInputs);
      items.pointers(block.errors, "errors");
      items.pointers(block.turned_inputs, "transposed inputs", kMaxInputs);
      items.pointers(block.turned_errors, "transposed errors");
      items.pointers(block.grad_inputs, "gradients of inputs", kMaxInputs);
      items.pointers(block.grad_errors, "gradients of errors");
      blocks_.push_back(block);
    }
    const SegmentMemory kept = m.segment();
    chunk_.kept = kept.data;
    chunk_.kept_bytes = kept.bytes;
    chunk_.blocks = blocks_.data();
    chunk_.block_count = int64_t(blocks_.size());
  }
  const FactoredChunk& chunk() const { return chunk_; }

 private:
  std::vector<PairBlock> blocks_;
  FactoredChunk chunk_{};
};

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
        level.*field = float(items.real());
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
      tensor.decay = float(items.real());
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

// A step's problem, from a tuple of its settings (dtype, independent, split, batch, heads, dim; addresses of mix and of the
// positions) and one per level: form, activation, rule, chunk size, segment, hidden, step bound; addresses or None of the initial
// weights (a tuple), target, gate weight and bias, weights and momentum (tuples), k, v, lr, retention, momentum gate,
// predictions.
inline StepProblem step_problem(const py::tuple& settings, const py::tuple& levels) {
  StepProblem problem{};
  Items s(settings.ptr(), "settings", 8);
  problem.dtype = static_cast<DType>(s.number());
  problem.independent = static_cast<int32_t>(s.number());
  problem.split = static_cast<int32_t>(s.number());
  problem.batch = s.number();
  problem.heads = s.number();
  problem.dim = s.number();
  problem.mix = s.pointer();
  problem.positions = static_cast<int64_t*>(s.pointer());
  problem.level_count = int64_t(levels.size());
  Items all(levels.ptr(), "levels");
  for (int64_t l = 0; l < problem.level_count && l < kMaxStepLevels; ++l) {
    Items items(all.next(), "a level", 19);
    StepLevel& level = problem.levels[l];
    level.form = static_cast<Form>(items.number());
    level.activation = static_cast<Activation>(items.number());
    level.rule = static_cast<Rule>(items.number());
    level.chunk_size = items.number();
    level.segment = items.number();
    level.hidden = items.number();
    level.step_bound = items.real();
    items.pointers(level.initial, "initial");
    level.target = items.pointer();
    level.gate_weight = items.pointer();
    level.gate_bias = items.pointer();
    items.pointers(level.weights, "weights");
    items.pointers(level.momentum, "momentum");
    level.k = items.pointer();
    level.v = items.pointer();
    level.lr = static_cast<float*>(items.pointer());
    level.retention = static_cast<float*>(items.pointer());
    level.momentum_gate = static_cast<float*>(items.pointer());
    level.predictions = static_cast<float*>(items.pointer());
  }
  return problem;
}

// Adds what was compiled with nvcc.
void add_cuda(py::module_& m);

}  // namespace hope::bindings
