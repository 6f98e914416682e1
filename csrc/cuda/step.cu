// One token of every sequence through all levels of a Continuum Memory System: one cooperative launch.
//
// Roofline: memory. A memory (mlp) is read once for each token, 8 D H bytes; one that is written is read and written: 16 D H
// (with momentum 32). Shared weights (projections, the level that is never written) are read once. State lives in the
// buffer's tensors; nothing stays on chip between tokens. FLOPs: 4 D H a token and pair for the read, 8 D H C for a write
// of C tokens, 2 a shared weight and sequence: CUDA cores in float32 keep up with the reads; writes of C >= 64 and shared
// weights with a large batch are bound by them.
//
// Phases, all blocks meeting at a grid barrier between them. A stage is what reads one input: a level, or all levels where
// they are independent.
//   1. targets and gates of the token, hidden units of a plain level; reads of the memories. A memory that is not split and
//      completes its chunk waits for its target, so that one block reads and writes it while L2 holds it.
//   2. where needed: those memories; the output of a plain level.
// Split memories (fewer pairs of sequence and head than blocks) are read piece by piece; they are written in phase 1 of the
// next stage, since nothing of this token depends on it. A chain of L split levels has L barriers.
//
// Deterministic: each sum has one order, whatever the batch, the number of blocks and the split.
#include "cuda/step.h"

#include <type_traits>

#include "cuda/launch.h"
#include "cuda/step_common.h"
#include "cuda/step_products.h"
#include "cuda/step_read.h"
#include "cuda/step_write.h"

namespace hope::cuda {
namespace stepping {
namespace {

namespace cg = cooperative_groups;

// Every block's own copy of the levels and of where the sequences stand, and whether a level is due for any of them.
__device__ void look_at_the_stack(const StepProblem& p) {
  Stack& shared = block_shared<Stack>();
  constexpr int kWords = sizeof(StepLevel) / sizeof(uint64_t);
  static_assert(sizeof(StepLevel) % sizeof(uint64_t) == 0, "copied word by word");
  const auto from = reinterpret_cast<const uint64_t*>(p.levels);
  const auto to = reinterpret_cast<uint64_t*>(shared.levels);
  for (int i = int(threadIdx.x); i < p.level_count * kWords; i += kThreads) to[i] = from[i];
  for (int b = int(threadIdx.x); b < p.batch; b += kThreads) shared.at[b] = max(p.positions[b], int64_t(0));
  __syncthreads();
  for (int64_t l = warp_id(); l < p.level_count; l += kWarps) {
    bool due = false;
    if (written(shared.levels[l]))
      for (int b = lane_id(); b < p.batch; b += 32) due |= is_due(shared.levels[l], b);
    due = __any_sync(kAllLanes, due);
    if (lane_id() == 0) shared.due[l] = due;  // a barrier of the block comes before the first look at it
  }
}

// Calls body with the dtype of tokens and shared weights, as a number, and the sequences that are multiplied together.
template <class Body>
__device__ __forceinline__ void with_products(const StepProblem& p, const Body& body) {
  const auto with_batch = [&](auto number) {
    if (p.batch == 1)
      body(number, std::integral_constant<int, 1>{});
    else
      body(number, std::integral_constant<int, 8>{});
  };
  if (p.dtype == DType::bfloat16)
    with_batch(__nv_bfloat16{});
  else if (p.dtype == DType::float16)
    with_batch(__half{});
  else
    with_batch(float{});
}

// Targets and gates of a memory's tokens in the first phase; the two layers of a level that is never written, one in each.
__device__ void shared_products(const Arguments& a, const StepLevel& level, int phase, float* sums, Deal& deal) {
  const StepProblem& p = a.p;
  if (written(level) ? phase == 1 : phase == 0 && level.form == Form::linear) return;
  with_products(p, [&](auto number, auto batch) {
    using T = decltype(number);
    constexpr int kBatch = decltype(batch)::value;
    const int64_t tiles = (p.batch + kBatch - 1) / kBatch;
    if (written(level))
      each(deal, tiles * projection_blocks(a), [&](int64_t i) { project<T, kBatch>(a, level, i); });
    else
      each(deal, tiles * column_tiles(phase == 0 ? level.hidden : width_of(p)),
           [&](int64_t i) { plain<T, kBatch>(a, level, phase == 1, sums, i); });
  });
}

// Memories that are not split: read in the first phase, or read and written in the second where a chunk is complete.
__device__ void read_and_write(const Arguments& a, const StepLevel& level, int phase, float* sums, Deal& deal) {
  const StepProblem& p = a.p;
  if (!written(level)) return;
  each(deal, p.batch * p.heads, [&](int64_t pair) {
    if (int(is_due(level, pair / p.heads)) != phase) return;
    read_whole(a, level, sums, pair);
    if (phase == 0) return;
    if (level.chunk_size == 1) {
      __syncthreads();  // the prediction is another warp's
      for (int piece = warp_id(); piece < piece_count(p, level); piece += kWarps)
        write_token(a, level, sums, pair, piece);
    } else {
      for (int piece = 0; piece < piece_count(p, level); ++piece) write_piece(a, level, sums, pair, piece);
    }
  });
}

// Split memories after their stage: complete chunks are written, of the others the prediction is kept.
__device__ void finish_split(const Arguments& a, const StepLevel& level, const float* sums, Deal& deal) {
  const StepProblem& p = a.p;
  if (!written(level)) return;
  const int pieces = piece_count(p, level);
  if (level.chunk_size == 1) {
    __syncthreads();  // shared memory is another item's until here
    return each_warp(deal, p.batch * p.heads * pieces, [&](int64_t item) {
      write_token(a, level, sums, item / pieces, int(item % pieces));
    });
  }
  each(deal, p.batch * p.heads * pieces, [&](int64_t item) {
    const int64_t pair = item / pieces;
    if (is_due(level, pair / p.heads)) write_piece(a, level, sums, pair, int(item % pieces));
  });
  const int64_t numbers = p.batch * p.heads * p.dim;
  each(deal, (numbers + kThreads - 1) / kThreads, [&](int64_t item) {
    const int64_t i = item * kThreads + threadIdx.x;
    if (i >= numbers) return;
    const int64_t pair = i / p.dim, d = i % p.dim, b = pair / p.heads;
    if (is_due(level, b)) return;
    const float prediction = add_pieces(sums + pair * pieces * p.dim + d, pieces, p.dim);
    level.predictions[kept_at(p, level, b, slot_of(level, b), pair % p.heads) * p.dim + d] = prediction;
  });
}

__device__ Input output_of(const Arguments& a, int64_t level) {
  return {nullptr, 0, a.sums[level], sums_kept(a.p, block_shared<Stack>().levels[level])};
}

// The layer's output from those of its levels: the last, or all in the shares softmax(mix).
__device__ void join(const Arguments& a, Deal& deal) {
  const StepProblem& p = a.p;
  const int64_t width = width_of(p), numbers = p.batch * width;
  each(deal, (numbers + kThreads - 1) / kThreads, [&](int64_t item) {
    const int64_t i = item * kThreads + threadIdx.x;
    if (i >= numbers) return;
    const int64_t b = i / width;
    const int column = int(i % width);
    float y = 0;
    if (!p.independent) {
      y = read(p, output_of(a, p.level_count - 1), b, column);
    } else {
      const auto mix = [&](int64_t l) { return number_at(p.dtype, p.mix, l); };
      float largest = mix(0), total = 0;
#pragma unroll 1
      for (int64_t l = 1; l < p.level_count; ++l) largest = max(largest, mix(l));
#pragma unroll 1
      for (int64_t l = 0; l < p.level_count; ++l) total += expf(mix(l) - largest);
#pragma unroll 1
      for (int64_t l = 0; l < p.level_count; ++l)
        y = fmaf(expf(mix(l) - largest) / total, read(p, output_of(a, l), b, column), y);
    }
    put_number(p.dtype, p.output, i, y);
  });
}

__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ Arguments a) {
  const StepProblem& p = a.p;
  look_at_the_stack(p);
  Stack& stack = block_shared<Stack>();
  const StepLevel* const levels = stack.levels;
  const int count = int(p.level_count), together = p.independent ? count : 1;
#pragma unroll 1
  for (int first = 0; first < count; first += together) {
    const bool last = first + together == count;
    if (threadIdx.x == 0) {
      stack.in = first == 0 ? Input{p.x, p.x_row, nullptr, 0} : output_of(a, first - 1);
      // A chain's last level hands its output over itself, unless it is split.
      stack.output = last && !p.independent ? p.output : nullptr;
    }
    __syncthreads();  // the stage is known
    bool second = false;
#pragma unroll 1
    for (int l = first; l < first + together; ++l) second |= !written(levels[l]) || (!p.split && stack.due[l]);
    // Both phases are one code: what is inlined here is inlined once.
#pragma unroll 1
    for (int phase = 0; phase < 2; ++phase) {
      Deal deal;
#pragma unroll 1
      for (int l = first; l < first + together && (phase == 0 || second); ++l) {
        if (!p.split)
          read_and_write(a, levels[l], phase, a.sums[l], deal);
        else if (phase == 0)
          read_split(a, levels[l], a.sums[l], deal);
        shared_products(a, levels[l], phase, a.sums[l], deal);
      }
      // Split memories are finished a stage later, those of the last one in its second phase.
      const int from = phase == 0 && first > 0 ? first - 1 : first, to = phase == 1 && last ? count : first;
#pragma unroll 1
      for (int l = from; l < to && p.split; ++l) finish_split(a, levels[l], a.sums[l], deal);
      if (phase == 0 || (second && (!last || p.independent))) cg::this_grid().sync();
    }
  }
  Deal deal;
  if (p.independent || (p.split && written(levels[count - 1]))) join(a, deal);
  // Every block has looked at the positions: all have met since.
  if (blockIdx.x == 0)
    for (int b = int(threadIdx.x); b < p.batch; b += kThreads) p.positions[b] = stack.at[b] + 1;
}

int64_t rounded_up(int64_t bytes) { return (bytes + 127) / 128 * 128; }

// The workspace: the sums of each level, then the hidden units of a level that is never written.
int64_t lay_out(const StepProblem& p, unsigned char* work, Arguments* a) {
  int64_t bytes = 0;
  for (int64_t l = 0; l < p.level_count; ++l) {
    if (a) a->sums[l] = reinterpret_cast<float*>(work + bytes);
    bytes += rounded_up(p.batch * p.heads * p.dim * sums_kept(p, p.levels[l]) * int64_t(sizeof(float)));
  }
  if (a) a->hidden = reinterpret_cast<float*>(work + bytes);
  const StepLevel& last = p.levels[p.level_count - 1];
  return written(last) ? bytes : bytes + rounded_up(p.batch * last.hidden * int64_t(sizeof(float)));
}

size_t shared_bytes(const StepProblem& p) {
  size_t bytes = sizeof(ProductShared) > sizeof(ReadShared) ? sizeof(ProductShared) : sizeof(ReadShared);
  for (int64_t l = 0; l < p.level_count; ++l) {
    if (!written(p.levels[l])) continue;
    const auto needed = size_t(WritePlan(p.dim, p.levels[l].form).bytes());
    if (needed > bytes) bytes = needed;
  }
  return bytes;
}

Status run(const Arguments& a, int device, cudaStream_t queue) {
  LaunchShape shape;
  shape.block = kThreads;
  shape.shared_bytes = shared_bytes(a.p);
  shape.cooperative = true;
  shape.stream = queue;
  // As many blocks as run at once: a grid barrier allows no more. More shared memory than usual must be allowed before
  // asking.
  int multiprocessors = 0, blocks = 0;
  cudaError_t error =
      cudaFuncSetAttribute(step_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.shared_bytes));
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, step_kernel, kThreads, shape.shared_bytes);
  if (error != cudaSuccess) return status_of(error, "step asks what the device holds");
  if (blocks < 1) return {StatusCode::unsupported, "step: this device holds no block of the kernel"};
  shape.grid = unsigned(blocks * multiprocessors);
  return launch("step", shape, step_kernel, a);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace
}  // namespace stepping

Status check_step(const StepProblem& p) {
  const auto refused = [](const char* message) { return Status{StatusCode::unsupported, message}; };
  const Status status = check_step_problem(p);
  if (status.code != StatusCode::ok) return status;
  if (p.dtype != DType::float32 && p.dtype != DType::bfloat16 && p.dtype != DType::float16)
    return refused("tokens must be float32, bfloat16 or float16");
  if (p.batch > kMaxStepBatch) return refused("it takes up to 256 sequences");
  if (p.dim % 8 != 0 || p.dim > kMaxStepDim) return refused("a head's features must be a multiple of 8, up to 128");
  for (int64_t l = 0; l < p.level_count; ++l) {
    const StepLevel& level = p.levels[l];
    if (level.form != Form::linear && level.hidden % 8 != 0) return refused("hidden units must be a multiple of 8");
    for (int i = 0; i < weight_count(level.form); ++i)
      if (!stepping::aligned(level.initial[i])) return refused("parameters must be aligned to 16 bytes");
    if (level.chunk_size == 0) continue;
    if (level.rule == Rule::dgd)
      return refused("rule 'dgd' solves a triangular system at each write, which the kernel does not");
    if (!stepping::aligned(level.target) || !stepping::aligned(level.gate_weight))
      return refused("parameters must be aligned to 16 bytes");
    if (p.batch == 0) continue;
    if (!level.predictions) return {StatusCode::invalid_argument, "a part of the state is missing"};
    for (int i = 0; i < weight_count(level.form); ++i)
      if (!stepping::aligned(level.weights[i])) return refused("the state must be aligned to 16 bytes");
  }
  return {};
}

int64_t step_shared_memory(const StepProblem& problem) {
  return int64_t(stepping::shared_bytes(problem) + (sizeof(stepping::Stack) + 127) / 128 * 128);
}

int64_t step_workspace(const StepProblem& problem) { return stepping::lay_out(problem, nullptr, nullptr); }

Status step(const StepProblem& problem, void* workspace, int64_t workspace_bytes, int device, void* stream) {
  // Host checks.
  const Status status = check_step(problem);
  if (status.code != StatusCode::ok) return status;
  if (problem.batch > 0 && (!problem.x || !problem.output)) return {StatusCode::invalid_argument, "x or output is missing"};
  if (problem.batch > 0 && (!workspace || workspace_bytes < step_workspace(problem)))
    return {StatusCode::invalid_argument, "the workspace is missing or too small"};

  // Early return.
  if (problem.batch == 0) return {};

  // Dispatch.
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return status_of(error, "step chooses its device");
  stepping::Arguments a{};
  a.p = problem;
  stepping::lay_out(problem, static_cast<unsigned char*>(workspace), &a);
  for (a.key_lanes = 1; 4 * a.key_lanes < problem.dim; a.key_lanes *= 2) {
  }
  // Few sequences: rather all multiprocessors at work than each input used for several rows.
  a.rows_together = problem.batch > 4 ? 4 : 1;
  return stepping::run(a, device, static_cast<cudaStream_t>(stream));
}

}  // namespace hope::cuda
