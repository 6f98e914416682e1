// Runs the CPU engine over random scans, updates and chunks of the factored plan, for sanitizers to watch:
// `driver CASES [SEED [FILE]]`. FILE receives a line for each result, by which two builds of the engine can be compared: case,
// name, element type, sum, sum of magnitudes.
//
// Every array is an allocation of its own and exactly as large as the description says, so that AddressSanitizer sees the
// first element read or written outside. Results that are not wanted are absent, those that are must be complete: a value
// that nothing has written stays NaN, and is found. Every case runs with one thread and with several, which must give the
// same bits. Exit status 1 and one line for a case that fails; a sanitizer ends the program by itself.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/engine.h"

namespace {

using namespace hope;

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

size_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t whole(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  bool chance(double p) { return std::bernoulli_distribution(p)(engine_); }
  template <size_t kCount>
  int64_t one_of(const int64_t (&choices)[kCount]) {
    return choices[whole(0, kCount - 1)];
  }
  double normal() { return std::normal_distribution<double>()(engine_); }
  double uniform() { return std::uniform_real_distribution<double>()(engine_); }

 private:
  std::mt19937_64 engine_;
};

// Numbers of one dtype in an allocation without slack.
class Array {
 public:
  Array() = default;
  Array(DType dtype, int64_t count)
      : dtype_(dtype), count_(count), data_(std::malloc(size_t(count) * bytes_of(dtype)), std::free) {
    if (!data_ && count > 0) fail("no memory for the case");
    for (int64_t i = 0; i < count; ++i) set(i, NAN);
  }
  void* data() const { return data_.get(); }
  int64_t count() const { return count_; }
  void set(int64_t i, double x) const {
    char* at = static_cast<char*>(data()) + size_t(i) * bytes_of(dtype_);
    if (dtype_ == DType::float64) return put(at, x);
    const float f = float(x);
    if (dtype_ == DType::float32) return put(at, f);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const bool nan = std::isnan(f);
    if (dtype_ == DType::bfloat16) return put(at, uint16_t(nan ? 0x7fc0 : bits >> 16));
    // float16, for normal numbers and zero; smaller ones become zero.
    const int32_t exponent = int32_t(bits >> 23 & 0xff) - 112;
    const uint32_t rest = exponent <= 0 ? 0 : uint32_t(exponent) << 10 | (bits >> 13 & 0x3ff);
    put(at, uint16_t(nan ? 0x7e00 : (bits >> 16 & 0x8000) | rest));
  }
  bool nan(int64_t i) const {
    const char* at = static_cast<const char*>(data()) + size_t(i) * bytes_of(dtype_);
    if (dtype_ == DType::float64) return std::isnan(get<double>(at));
    if (dtype_ == DType::float32) return std::isnan(get<float>(at));
    const uint16_t bits = get<uint16_t>(at) & 0x7fff;
    return bits > (dtype_ == DType::bfloat16 ? 0x7f80 : 0x7c00);
  }
  double value(int64_t i) const {
    const char* at = static_cast<const char*>(data()) + size_t(i) * bytes_of(dtype_);
    if (dtype_ == DType::float64) return get<double>(at);
    if (dtype_ == DType::float32) return get<float>(at);
    const uint16_t bits = get<uint16_t>(at);
    if (dtype_ == DType::bfloat16) {
      const uint32_t wide = uint32_t(bits) << 16;
      float f;
      std::memcpy(&f, &wide, 4);
      return f;
    }
    const int exponent = bits >> 10 & 0x1f;
    const double size = exponent ? std::ldexp(1024 + (bits & 0x3ff), exponent - 25) : std::ldexp(bits & 0x3ff, -24);
    return bits & 0x8000 ? -size : size;
  }
  DType dtype() const { return dtype_; }
  bool same_bits(const Array& other) const {
    if (count_ != other.count_) return false;
    return count_ == 0 || std::memcmp(data(), other.data(), size_t(count_) * bytes_of(dtype_)) == 0;
  }

 private:
  template <class T>
  static void put(char* to, T x) {
    std::memcpy(to, &x, sizeof x);
  }
  template <class T>
  static T get(const char* from) {
    T x;
    std::memcpy(&x, from, sizeof x);
    return x;
  }
  DType dtype_ = DType::float32;
  int64_t count_ = 0;
  std::shared_ptr<void> data_;
};

// Everything one case consists of; results are kept by name.
struct Case {
  ScanProblem problem{};
  ForwardResult forward{};
  BackwardResult backward{};
  std::vector<Sequence> sequences;
  std::vector<Array> arrays;  // what the problem points to
  struct Named {
    std::string name;
    Array array;
    bool complete;           // every element is written
    std::vector<bool> gaps;  // elements between its rows, which nobody may write; empty where there are none
  };
  std::vector<Named> results;
  std::string description;

  DType state_dtype() const { return problem.dtype == DType::float64 ? DType::float64 : DType::float32; }
  int64_t inner(int i) const {
    return problem.form == Form::linear || i + 1 < weight_count(problem.form) ? problem.dim : problem.hidden;
  }
  int64_t outer(int i) const {
    return problem.form == Form::linear || i + 1 == weight_count(problem.form) ? problem.dim : problem.hidden;
  }
};

class Builder {
 public:
  Builder(Random& random, Case& made) : random_(random), c_(made), p_(made.problem) {}

  void build() {
    p_.form = Form(random_.whole(0, 2));
    p_.activation = Activation(random_.whole(0, 3));
    p_.objective = Objective(random_.whole(0, 3));
    p_.rule = Rule(random_.whole(0, 1));
    p_.residual = int32_t(random_.whole(0, 1));
    p_.dtype = DType(random_.whole(0, 3));
    p_.heads = random_.whole(1, 3);
    p_.dim = random_.one_of({1, 3, 8, 17, 32, 64});
    p_.hidden = p_.form == Form::linear ? p_.dim : random_.one_of({1, 5, 16, 33, 64, 80, 1040});
    p_.chunk_size = random_.one_of({1, 2, 7, 16, 33});
    p_.checkpoint_interval = random_.whole(1, 4);
    p_.bptt_chunks = random_.chance(0.3) ? random_.whole(1, 3) : 0;
    const bool table = random_.chance(0.35);
    const bool large = !table && random_.chance(0.06);  // threads share one product
    if (large) p_.dim = 128, p_.hidden = p_.form == Form::linear ? 128 : 512, p_.chunk_size = 128, p_.heads = 1;
    table ? packed() : uniform(large);
    tokens();
    coefficients();
    memories();
    char text[256];
    std::snprintf(text, sizeof text, "form %d act %d objective %d rule %d residual %d dtype %d", int(p_.form),
                  int(p_.activation), int(p_.objective), int(p_.rule), p_.residual, int(p_.dtype));
    c_.description = text;
    const std::pair<const char*, int64_t> sizes[] = {
        {" B", p_.batch}, {" T", p_.tokens}, {" N", p_.heads}, {" D", p_.dim}, {" H", p_.hidden}, {" C", p_.chunk_size},
        {" P", p_.pending_capacity}, {" S", p_.sequence_count}};
    for (const auto& [name, size] : sizes) c_.description += name + std::to_string(size);
    c_.description += std::string(p_.sequences ? " table" : "") + (p_.momentum_step ? " momentum" : "");
  }

 private:
  double around(double scale) { return scale * random_.normal(); }

  Array filled(DType dtype, int64_t count, double scale) {
    Array array(dtype, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, around(scale));
    c_.arrays.push_back(array);
    return array;
  }

  void uniform(bool large) {
    p_.batch = p_.sequence_count = large ? 1 : random_.whole(1, 3);
    p_.pending_capacity = random_.chance(0.5) ? random_.whole(0, p_.chunk_size - 1) : 0;
    p_.tokens = random_.chance(0.03) ? 0 : random_.whole(large ? p_.chunk_size : 1, 3 * p_.chunk_size + 5);
    p_.first_chunk = random_.whole(0, 3);
    p_.chunks = (p_.pending_capacity + p_.tokens) / p_.chunk_size;
  }

  // Sequences one behind the other in one row, each with pending tokens of its own; a few tokens belong to none.
  void packed() {
    p_.batch = 1;
    p_.sequence_count = random_.whole(1, 4);
    p_.pending_capacity = p_.chunk_size - 1;
    int64_t start = random_.whole(0, 2);
    for (int64_t s = 0; s < p_.sequence_count; ++s) {
      const int64_t length = random_.whole(0, 2 * p_.chunk_size + 3), pending = random_.whole(0, p_.pending_capacity);
      c_.sequences.push_back({0, start, length, pending, p_.chunks, random_.whole(0, 3)});
      start += length;
      p_.chunks += (pending + length) / p_.chunk_size;
    }
    p_.tokens = std::max<int64_t>(1, start + random_.whole(0, 2));
    p_.sequences = c_.sequences.data();
  }

  // [rows, tokens, heads, dim] with random gaps between heads, tokens and rows.
  TokenView view(const char* result, int64_t rows, int64_t tokens, bool complete = true) {
    TokenView made;
    made.head = p_.dim + (random_.chance(0.3) ? random_.whole(1, 5) : 0);
    made.token = p_.heads * made.head + (random_.chance(0.3) ? random_.whole(1, 5) : 0);
    made.row = tokens * made.token + (random_.chance(0.3) ? random_.whole(1, 5) : 0);
    if (rows * tokens == 0) return {};
    const int64_t count = (rows - 1) * made.row + (tokens - 1) * made.token + (p_.heads - 1) * made.head + p_.dim;
    if (result) {
      Array array(p_.dtype, count);
      std::vector<bool> gaps(size_t(count), true);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t t = 0; t < tokens; ++t)
          for (int64_t n = 0; n < p_.heads; ++n)
            for (int64_t d = 0; d < p_.dim; ++d) gaps[size_t(r * made.row + t * made.token + n * made.head + d)] = false;
      c_.results.push_back({result, array, complete, gaps});
      made.data = array.data();
    } else {
      made.data = filled(p_.dtype, count, 0.5 / std::sqrt(double(p_.dim))).data();  // small: writes must not diverge
    }
    return made;
  }

  void tokens() {
    const bool writes = random_.chance(0.9), reads = !writes || random_.chance(0.85);
    const int64_t S = p_.sequence_count, P = p_.pending_capacity;
    const bool all = !p_.sequences;  // tokens of no sequence have no output
    if (writes) {
      p_.k = view(nullptr, p_.batch, p_.tokens), p_.v = view(nullptr, p_.batch, p_.tokens);
      if (P > 0) p_.pending_k = view(nullptr, S, P), p_.pending_v = view(nullptr, S, P);
    } else {
      p_.chunks = 0, p_.pending_capacity = 0;
      for (Sequence& s : c_.sequences) s.pending = 0, s.chunk_row = 0;
    }
    if (reads) {
      p_.q = writes && random_.chance(0.3) ? p_.k : view(nullptr, p_.batch, p_.tokens);
      c_.forward.output = view("output", p_.batch, p_.tokens, all);
      if (random_.chance(0.85)) c_.backward.grad_output = view(nullptr, p_.batch, p_.tokens);
      c_.backward.q = view("grad q", p_.batch, p_.tokens, all);
    }
    if (writes) {
      c_.backward.k = view("grad k", p_.batch, p_.tokens, all), c_.backward.v = view("grad v", p_.batch, p_.tokens, all);
      if (P > 0) {
        c_.backward.pending_k = view("grad pending k", S, P, all);
        c_.backward.pending_v = view("grad pending v", S, P, all);
      }
    }
  }

  // One factor for each token of the chunk rows, or for each row.
  const void* factors(int64_t count, double low, double high) {
    Array array(c_.state_dtype(), count);
    for (int64_t i = 0; i < count; ++i) array.set(i, low + (high - low) * random_.uniform());
    c_.arrays.push_back(array);
    return array.data();
  }
  void* result(const char* name, int64_t count, bool complete = true) {
    Array array(c_.state_dtype(), count);
    c_.results.push_back({name, array, complete, {}});
    return array.data();
  }

  void coefficients() {
    const int64_t rows = (p_.sequences ? p_.chunks : p_.sequence_count * p_.chunks) * p_.heads, each = rows * p_.chunk_size;
    if (!p_.k.data || rows == 0) return;
    p_.step = factors(each, 0, 0.1 / double(p_.chunk_size));
    c_.backward.step = result("grad step", each);
    if (p_.rule == Rule::dgd) {
      if (!random_.chance(0.6)) return;
      p_.retention = factors(each, 0.9, 1);
      c_.backward.retention = result("grad retention", each);
      return;
    }
    if (random_.chance(0.6)) {
      p_.decay = factors(rows, 0.9, 1);
      c_.backward.decay = result("grad decay", rows);
    }
    if (!random_.chance(0.5)) return;
    p_.momentum_step = factors(each, 0, 0.1 / double(p_.chunk_size));
    p_.momentum_carry = factors(rows, 0, 0.5), p_.momentum_decay = factors(rows, 0, 0.5);
    c_.backward.momentum_step = result("grad momentum step", each);
    c_.backward.momentum_carry = result("grad momentum carry", rows);
    c_.backward.momentum_decay = result("grad momentum decay", rows);
  }

  // Elements of what the forward keeps of one chunk of the last segment, in the engine's layout.
  int64_t record_elements() const {
    const int64_t panel = 256 / int64_t(bytes_of(c_.state_dtype())), C = p_.chunk_size, D = p_.dim, H = p_.hidden;
    const auto padded = [&](int64_t rows, int64_t columns) { return rows * ((columns + panel - 1) / panel * panel); };
    const bool delta = p_.rule == Rule::dgd;
    const int64_t rows = (p_.objective == Objective::self ? 3 : 2) * C;
    int64_t count = (delta ? 2 : 1) * padded(C, D);
    for (int i = 0; i < weight_count(p_.form); ++i)
      count += (p_.momentum_step ? 2 : 1) * padded(c_.inner(i), c_.outer(i));
    if (p_.form == Form::linear) return count;
    count += (delta ? 3 : 2) * padded(rows, H) + 2 * padded(C, H);
    return count + (p_.form == Form::glu ? 2 * padded(rows, H) : 0);
  }

  void memories() {
    const int64_t pairs = p_.sequence_count * p_.heads;
    const bool momentum = p_.momentum_step != nullptr, shared = random_.chance(0.5);
    const int64_t last_chunk = (p_.pending_capacity + p_.tokens - 1) / p_.chunk_size;
    const int64_t checkpoints =
        p_.sequences ? p_.chunks / p_.checkpoint_interval : last_chunk / p_.checkpoint_interval * p_.sequence_count;
    for (int i = 0; i < weight_count(p_.form); ++i) {
      const int64_t in = c_.inner(i), out = c_.outer(i), size = in * out;
      const auto matrix = [&](DType dtype, bool of_heads) {
        MatrixView made;
        made.dtype = dtype;
        const bool transposed = random_.chance(0.3);
        made.in = transposed ? 1 : out, made.out = transposed ? in : 1, made.head = size;
        made.sequence = of_heads ? 0 : p_.heads * size;
        made.data = filled(dtype, (of_heads ? p_.heads : pairs) * size, 0.5 / std::sqrt(double(in))).data();
        return made;
      };
      p_.weights[i] = matrix(random_.chance(0.3) ? p_.dtype : c_.state_dtype(), shared);
      if (momentum && random_.chance(0.5)) p_.momentum[i] = matrix(c_.state_dtype(), false);
      if (p_.k.data) c_.forward.weights[i] = result("weights", pairs * size);
      if (momentum) c_.forward.momentum[i] = result("momentum", pairs * size);
      if (p_.k.data && random_.chance(0.7)) c_.backward.grad_weights[i] = matrix(c_.state_dtype(), false);
      if (momentum && random_.chance(0.5)) c_.backward.grad_momentum[i] = matrix(c_.state_dtype(), false);
      c_.backward.weights[i] = result("grad weights", pairs * size);
      if (momentum) c_.backward.momentum[i] = result("grad momentum", pairs * size);
      if (checkpoints > 0) {
        // Rows of sequences that are too short for one stay unwritten.
        c_.backward.checkpoints[i] = c_.forward.checkpoints[i] = result("checkpoints", checkpoints * p_.heads * size, false);
        if (momentum)
          c_.backward.checkpoints[kMaxWeights + i] = c_.forward.checkpoints[kMaxWeights + i] =
              result("momentum checkpoints", checkpoints * p_.heads * size, false);
      }
    }
    if (p_.sequences || !p_.k.data || p_.checkpoint_interval > 2 || !random_.chance(0.7)) return;
    const int64_t last_state = p_.q.data ? last_chunk : p_.chunks - 1;
    const int64_t bytes = last_state % p_.checkpoint_interval * record_elements() * int64_t(bytes_of(c_.state_dtype()));
    if (last_state < 0 || bytes == 0) return;
    c_.forward.segment = {result("segment", pairs * bytes / int64_t(bytes_of(c_.state_dtype())), false), bytes};
    c_.backward.segment = c_.forward.segment;
  }

  Random& random_;
  Case& c_;
  ScanProblem& p_;
};

// Runs a case; its results.
Case run(uint64_t seed, int threads) {
  Random random(seed);
  Case made;
  Builder(random, made).build();
  made.problem.sequences = made.sequences.empty() ? nullptr : made.sequences.data();
  made.problem.threads = threads;
  const auto check = [&](const char* pass, Status status) {
    if (status.code != StatusCode::ok)
      fail("case " + std::to_string(seed) + " (" + made.description + "), " + pass + ": " + status.message);
  };
  check("forward", cpu::scan_forward(made.problem, made.forward));
  check("backward", cpu::scan_backward(made.problem, made.backward));
  for (const Case::Named& result : made.results)
    for (int64_t i = 0; i < result.array.count(); ++i) {
      const bool gap = !result.gaps.empty() && result.gaps[size_t(i)], nan = result.array.nan(i);
      if (gap ? nan : !nan || !result.complete) continue;
      fail("case " + std::to_string(seed) + " (" + made.description + "): element " + std::to_string(i) + " of " +
           result.name + (gap ? " lies between rows and was written" : " was not written, or is NaN"));
    }
  return made;
}

// An update of many tensors of several levels; parameters, accumulators, moments, copies and norms.
std::vector<Array> update(uint64_t seed, int threads) {
  Random random(seed);
  std::vector<UpdateTensor> tensors;
  std::vector<UpdateLevel> levels;
  std::vector<Array> arrays;
  const auto filled = [&](DType dtype, int64_t count, double low, double high) {
    Array array(dtype, count);
    for (int64_t i = 0; i < count; ++i) array.set(i, low + (high - low) * random.uniform());
    arrays.push_back(array);
    return array.data();
  };
  int64_t piece = 0;
  const int64_t level_count = random.whole(1, 4);
  for (int64_t l = 0; l < level_count; ++l) {
    UpdateLevel level{};
    level.rule = UpdateRule(random.whole(0, 2));
    level.due = int32_t(random.whole(0, 1)), level.nesterov = int32_t(random.whole(0, 1));
    level.first_piece = piece;
    level.lr = 0.01f, level.beta1 = 0.9f, level.beta2 = 0.99f, level.eps = 1e-8f;
    level.gain1 = 0.1f, level.gain2 = 0.01f, level.correction1 = 0.1f, level.correction2 = 0.01f, level.scale = 0.5f;
    level.max_norm = random.chance(0.3) ? 1.0f : 0.0f;
    for (int64_t t = random.whole(0, 4); t > 0; --t) {
      UpdateTensor tensor{};
      tensor.size = random.one_of({0, 1, 15, 100, kPieceElements, kPieceElements + 1, 20000});
      tensor.level = int32_t(l), tensor.first_piece = piece, tensor.decay = 0.01f;
      const auto floats = [&](double low, double high) {
        return static_cast<float*>(filled(DType::float32, tensor.size, low, high));
      };
      tensor.parameter = floats(-1, 1);
      constexpr int64_t kKinds[] = {int64_t(DType::float32), int64_t(DType::bfloat16), int64_t(DType::float16)};
      tensor.gradient_dtype = DType(random.one_of(kKinds));
      if (random.chance(0.8)) tensor.gradient = filled(tensor.gradient_dtype, tensor.size, -1, 1);
      if (!level.due || random.chance(0.6)) tensor.accumulator = floats(-1, 1);
      if (level.rule != UpdateRule::sgd) tensor.first = floats(-1, 1);
      if (level.rule == UpdateRule::adam) tensor.second = floats(0, 1);
      tensor.copy_dtype = random.chance(0.5) ? DType::bfloat16 : DType::float16;
      if (random.chance(0.6)) tensor.copy = filled(tensor.copy_dtype, tensor.size, -1, 1);
      piece += piece_count(tensor.size);
      tensors.push_back(tensor);
    }
    level.pieces = piece - level.first_piece;
    levels.push_back(level);
  }
  const float max_norm = random.chance(0.3) ? 1.0f : 0.0f;
  const auto norms = static_cast<float*>(filled(DType::float32, level_count, 0, 1));
  const LevelUpdateProblem problem{tensors.data(), levels.data(), int64_t(tensors.size()), level_count, 0.5f,
                                   max_norm,       norms};
  const Status status = cpu::level_update(problem, threads);
  if (status.code != StatusCode::ok) fail("update " + std::to_string(seed) + ": " + status.message);
  return arrays;
}

// A chunk of the factored plan, forward and backward, on pairs in tensors of their own and in slices of larger ones.
std::vector<Array> factored(uint64_t seed, int threads) {
  Random random(seed);
  FactoredChunk chunk{};
  chunk.form = Form(random.whole(0, 2));
  chunk.activation = Activation(random.whole(0, 3));
  chunk.objective = Objective(random.whole(0, 3));
  chunk.residual = int32_t(random.whole(0, 1));
  chunk.dtype = random.chance(0.7) ? DType::float32 : DType::float64;
  chunk.writes = random.chance(0.7);
  chunk.threads = threads;
  const bool together = random.chance(0.1);             // few tokens of several sequences, for no backward
  const bool large = !together && random.chance(0.06);  // threads share one product
  if (together) chunk.writes = 0;
  chunk.batch = together ? random.one_of({1, 3, 33}) : random.whole(1, 3), chunk.heads = large ? 1 : random.whole(1, 3);
  chunk.rows = together       ? random.whole(1, 4)
               : large        ? 128
               : chunk.writes ? random.one_of({1, 4, 5, 16, 33})
                              : random.one_of({1, 4, 7, 130});
  chunk.dim = together ? 512 : large ? 128 : random.one_of({16, 32, 80});
  chunk.hidden = chunk.form == Form::linear || together ? chunk.dim : large ? 512 : random.one_of({16, 48, 96});
  const int64_t tasks = chunk.batch * chunk.heads, D = chunk.dim, H = chunk.hidden;
  const int count = weight_count(chunk.form), inputs = count == 1 ? 1 : 2;
  const auto source = [&](int i) { return count > 1 && i + 1 == count ? 1 : 0; };
  const auto inner = [&](int i) { return source(i) == 1 ? H : D; };
  const auto outer = [&](int i) { return count == 1 || i + 1 == count ? D : H; };

  std::vector<Array> given, results;
  const auto filled = [&](int64_t size, double middle, double scale) {
    Array array(chunk.dtype, size);
    for (int64_t i = 0; i < size; ++i) array.set(i, middle + scale * random.normal());
    given.push_back(array);
    return array.data();
  };
  const auto empty = [&](int64_t size, double value) {
    Array array(chunk.dtype, size);
    for (int64_t i = 0; i < size; ++i) array.set(i, value);
    results.push_back(array);
    return array.data();
  };
  const auto expect = [&](const char* what, Status status) {
    if (status.code != StatusCode::ok) fail("factored " + std::to_string(seed) + ", " + what + ": " + status.message);
  };
  const auto turned = [&](const void* from, int64_t matrices, int64_t rows, int64_t columns, int64_t between) {
    const int64_t stride = (rows + kFactoredMultiple - 1) / kFactoredMultiple * kFactoredMultiple;
    Array array(chunk.dtype, matrices * columns * stride);
    given.push_back(array);
    const MatrixView view{const_cast<void*>(from), chunk.dtype, 0, between, columns, 1};
    expect("transposes", cpu::transpose_matrices(view, matrices, rows, columns, array.data(), stride, threads));
    return array.data();
  };
  const TokenView tokens{nullptr, chunk.rows * chunk.heads * D, chunk.heads * D, D};
  const auto at = [&](void* data) { return TokenView{data, tokens.row, tokens.token, tokens.head}; };
  const int64_t all = chunk.batch * tokens.row;
  const double small = 0.5 / std::sqrt(double(D));

  chunk.x = at(filled(all, 0, small));
  if (chunk.writes) chunk.target = at(filled(all, 0, small));
  for (int i = 0; i < count; ++i) {
    chunk.weights[i] = filled(chunk.heads * inner(i) * outer(i), 0, 0.5 / std::sqrt(double(inner(i))));
    chunk.turned_weights[i] = turned(chunk.weights[i], chunk.heads, inner(i), outer(i), inner(i) * outer(i));
  }
  std::vector<PairBlock> blocks(size_t(random.whole(0, 3)));
  int64_t pairs = 0;
  for (PairBlock& block : blocks) {
    block.count = random.one_of({1, 7, 16, 33});
    block.stride = block.count + (random.chance(0.5) ? 5 : 0);
    block.turned_stride = (block.count + kFactoredMultiple - 1) / kFactoredMultiple * kFactoredMultiple;
    pairs += block.count;
    const auto matrix = [&](int64_t features, const void*& data, const void*& transposed, void*& grad) {
      data = filled(((tasks - 1) * block.stride + block.count) * features, 0, small);
      transposed = turned(data, tasks, block.count, features, block.stride * features);
      if (!together && random.chance(0.8)) grad = empty(tasks * block.count * features, NAN);
    };
    for (int s = 0; s < inputs; ++s) matrix(s ? H : D, block.inputs[s], block.turned_inputs[s], block.grad_inputs[s]);
    for (int i = 0; i < count; ++i) matrix(outer(i), block.errors[i], block.turned_errors[i], block.grad_errors[i]);
  }
  chunk.blocks = blocks.data(), chunk.block_count = int64_t(blocks.size());
  if (pairs > 0) chunk.scale = filled(tasks * pairs, 0.1, 0.05);
  if (random.chance(0.5)) chunk.decay = filled(tasks, 0.9, 0.05);

  chunk.kept_bytes = cpu::factored_kept_bytes(chunk);
  Array kept(DType::float32, (tasks * chunk.kept_bytes + 3) / 4);
  chunk.kept = kept.data();
  FactoredResult result{};
  FactoredGradients grads{};
  result.output = at(empty(all, NAN));
  result.stride = chunk.rows;
  if (chunk.writes && inputs > 1) result.hidden = empty(tasks * chunk.rows * H, NAN);
  for (int i = 0; chunk.writes && i < count; ++i) result.errors[i] = empty(tasks * chunk.rows * outer(i), NAN);
  if (together) chunk.kept = nullptr, chunk.kept_bytes = 0;
  expect("forward", cpu::factored_forward(chunk, result));
  if (together) return results;

  if (random.chance(0.8)) grads.grad_output = at(filled(all, 0, 1));
  if (chunk.writes && random.chance(0.8)) {
    if (inputs > 1 && random.chance(0.8)) grads.grad_hidden = filled(tasks * chunk.rows * H, 0, 1);
    for (int i = 0; i < count; ++i)
      if (random.chance(0.8)) grads.grad_errors[i] = filled(tasks * chunk.rows * outer(i), 0, 1);
  }
  grads.x = at(empty(all, NAN));
  if (chunk.writes) grads.target = at(empty(all, NAN));
  for (int i = 0; i < count; ++i)
    if (random.chance(0.8)) grads.weights[i] = empty(chunk.heads * inner(i) * outer(i), NAN);
  if (pairs > 0) grads.scale = empty(tasks * pairs, 0);
  if (chunk.decay) grads.decay = empty(tasks, 0);
  expect("backward", cpu::factored_backward(chunk, grads));
  for (const Array& array : results)
    for (int64_t i = 0; i < array.count(); ++i)
      if (array.nan(i)) fail("factored " + std::to_string(seed) + ": a result was not written, or is NaN");
  return results;
}

// Some tokens of sequences at different places through a stack of levels.
std::vector<Array> steps(uint64_t seed, int threads) {
  Random random(seed);
  StepProblem p{};
  p.dtype = DType(random.whole(0, 3));
  const bool large = random.chance(0.1);  // threads share products
  p.batch = random.one_of({1, 3, 5}), p.heads = random.whole(1, 3);
  p.dim = large ? 96 : random.one_of({1, 7, 16, 33});
  p.level_count = random.whole(1, 3);
  p.independent = random.chance(0.3);
  const DType state = p.dtype == DType::float64 ? DType::float64 : DType::float32;
  const int64_t width = p.heads * p.dim;
  std::vector<Array> results, given;
  const auto filled = [&](std::vector<Array>& arrays, DType dtype, int64_t size, double middle, double scale) {
    Array array(dtype, size);
    for (int64_t i = 0; i < size; ++i) array.set(i, middle + scale * random.normal());
    arrays.push_back(array);
    return array.data();
  };
  const auto parameter = [&](int64_t size, double scale) { return filled(given, p.dtype, size, 0, scale); };
  const auto held = [&](int64_t size, double middle, double scale) {
    return static_cast<float*>(filled(results, state, size, middle, scale));
  };
  int64_t chunk = 1;
  for (int64_t l = 0; l < p.level_count; ++l) {
    StepLevel& level = p.levels[l];
    const bool plain = l > 0 && l + 1 == p.level_count && random.chance(0.5);
    level.form = Form(random.whole(0, 2));
    level.activation = Activation(random.whole(0, 3));
    level.rule = plain ? Rule::gd : Rule(random.whole(0, 1));
    chunk *= l == 0 ? random.whole(1, 3) : random.whole(1, 2);
    level.chunk_size = plain ? 0 : chunk;
    level.segment = plain ? 0 : random.one_of({0, 1, 2}) * chunk;
    level.hidden = level.form == Form::linear ? 0 : large ? 192 : random.one_of({1, 8, 21});
    level.step_bound = 0.1;
    const int count = weight_count(level.form);
    const bool momentum = level.rule == Rule::gd && random.chance(0.5), retention = random.chance(0.5);
    for (int i = 0; i < count; ++i) {
      const int64_t features = plain ? width : p.dim, copies = plain ? 1 : p.heads;
      const int64_t size = features * (level.form == Form::linear ? features : level.hidden);
      level.initial[i] = parameter(copies * size, 0.1);
      if (plain) continue;
      level.weights[i] = held(p.batch * copies * size, 0, 0.1);
      if (momentum) level.momentum[i] = held(p.batch * copies * size, 0, 0.01);
    }
    if (plain) continue;
    const int64_t kept = p.batch * chunk * p.heads, gates = 1 + retention + momentum;
    level.target = parameter(width * width, 0.1);
    level.gate_weight = parameter(gates * p.heads * width, 0.1);
    level.gate_bias = parameter(gates * p.heads, 0.1);
    level.k = filled(results, p.dtype, kept * p.dim, 0, 0.1);
    level.v = filled(results, p.dtype, kept * p.dim, 0, 0.1);
    level.lr = held(kept, 0.05, 0.01);
    if (retention) level.retention = held(kept, 0.9, 0.01);
    if (momentum) level.momentum_gate = held(kept, 0.5, 0.1);
  }
  if (p.independent) p.mix = parameter(p.level_count, 1);
  std::vector<int64_t> positions;
  for (int64_t b = 0; b < p.batch; ++b) positions.push_back(random.whole(0, 5));
  p.positions = positions.data();
  p.x_row = width + random.one_of({0, 3});
  Array output(p.dtype, p.batch * width);
  results.push_back(output);
  p.output = output.data();
  for (int token = 0; token < 5; ++token) {
    p.x = parameter((p.batch - 1) * p.x_row + width, 1);
    const std::unique_ptr<char[]> workspace(new char[size_t(cpu::step_workspace(p))]);
    const Status status = cpu::step(p, workspace.get(), cpu::step_workspace(p), threads);
    if (status.code != StatusCode::ok) fail("step " + std::to_string(seed) + ": " + status.message);
  }
  for (const Array& array : results)
    for (int64_t i = 0; i < array.count(); ++i)
      if (array.nan(i)) fail("step " + std::to_string(seed) + ": a result is NaN");
  return results;
}

// NaN stands for what nothing had to write.
void write_sums(std::FILE* file, uint64_t seed, const Case& made) {
  static const char* const kNames[] = {"float32", "float64", "bfloat16", "float16"};
  for (const Case::Named& result : made.results) {
    double sum = 0, magnitude = 0;
    for (int64_t i = 0; i < result.array.count(); ++i) {
      if (result.array.nan(i)) continue;
      sum += result.array.value(i), magnitude += std::abs(result.array.value(i));
    }
    std::string name = result.name;
    for (char& c : name)
      if (c == ' ') c = '_';
    const bool checkpoints = name.find("checkpoints") != std::string::npos || name == "segment";  // may hold padding
    if (!checkpoints)
      std::fprintf(file, "%llu %s %s %.17g %.17g\n", static_cast<unsigned long long>(seed), name.c_str(),
                   kNames[int(made.problem.dtype)], sum, magnitude);
  }
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 100;
  const uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0;
  std::FILE* sums = count > 3 ? std::fopen(arguments[3], "w") : nullptr;
  if (count > 3 && !sums) fail(std::string("cannot write ") + arguments[3]);
  for (int i = 0; i < cases; ++i) {
    const uint64_t seed = first + uint64_t(i);
    const Case alone = run(seed, 1), together = run(seed, 3);
    for (size_t r = 0; r < alone.results.size(); ++r)
      if (!alone.results[r].array.same_bits(together.results[r].array))
        fail("case " + std::to_string(seed) + " (" + alone.description + "): " + alone.results[r].name +
             " depends on the number of threads");
    if (sums) write_sums(sums, seed, alone);
    const auto same = [&](const char* what, const std::vector<Array>& one, const std::vector<Array>& several) {
      for (size_t r = 0; r < one.size(); ++r)
        if (!one[r].same_bits(several[r]))
          fail(what + (" " + std::to_string(seed)) + " depends on the number of threads");
    };
    same("update", update(seed, 1), update(seed, 3));
    same("factored", factored(seed, 1), factored(seed, 3));
    same("step", steps(seed, 1), steps(seed, 3));
  }
  if (sums && std::fclose(sums) != 0) fail("the sums were not written");
  std::printf("%d cases passed\n", cases);
  return 0;
}
