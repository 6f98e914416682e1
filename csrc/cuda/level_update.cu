// One launch that gathers the gradients of every level and updates those that are due.
//
// Roofline: memory. Of an element that is not due, gradient and accumulator are read, the accumulator is written (float32
// gradients: 12 bytes). A due one with adam and a 16-bit copy moves 34 bytes: gradient, accumulator, parameter and both
// moments in, all but the gradient and the copy out. Arithmetic is about 15 operations: far below any GPU's balance.
//
// Clipping needs a norm over all tensors of a level, the gradient of this step included, before the first of them is changed.
// A norm of an earlier pass would not be that of these gradients, and a second launch would cost more than the barrier; so the
// launch is cooperative then: the sums of squares of the due levels' pieces, a grid barrier, the update. The first
// pass writes no tensor: reading the gradient once more (2 to 4 bytes) is cheaper than writing the sum and reading it back (8).
// Without a bound there is no barrier and no second read. Every block adds up the pieces' sums itself, in one
// order, which costs 4 bytes per 8192 elements and block from L2 and spares a second barrier.
#include "cuda/level_update.h"

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/ptx.h"

namespace hope::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;  // elements a thread takes at a time: 16 bytes of float32
static_assert(kPieceElements % (kThreads * kVector) == 0, "a whole piece keeps every thread busy to its end");

// The problem as the kernel sees it: every pointer is a device pointer.
struct Arguments {
  const UpdateTensor* tensors;
  const UpdateLevel* levels;
  int64_t tensor_count, level_count, pieces;
  float weight, max_norm;
  float* sums;  // [pieces]: of squares
  float* norms;
};

struct Shared {
  double partial[kWarps];
};

// Aligned groups of kVector elements, one transaction each.
struct alignas(8) Quarter16 {
  uint16_t bits[kVector];
};
struct alignas(16) Quarter32 {
  float x[kVector];
};

__device__ __forceinline__ float from_16(uint16_t bits, DType dtype) {
  return dtype == DType::bfloat16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}
__device__ __forceinline__ uint16_t to_16(float x, DType dtype) {
  return dtype == DType::bfloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x)) : __half_as_ushort(__float2half_rn(x));
}

// Elements i .. i + kCount of an array; kCount is kVector only where every array of the tensor is aligned for it.
template <int kCount>
__device__ __forceinline__ void load(float (&x)[kCount], const float* from, int64_t i) {
  if constexpr (kCount == kVector) {
    const Quarter32 four = *reinterpret_cast<const Quarter32*>(from + i);
    for (int j = 0; j < kCount; ++j) x[j] = four.x[j];
  } else {
    x[0] = from[i];
  }
}
template <int kCount>
__device__ __forceinline__ void store(float* to, int64_t i, const float (&x)[kCount]) {
  if constexpr (kCount == kVector) {
    Quarter32 four;
    for (int j = 0; j < kCount; ++j) four.x[j] = x[j];
    *reinterpret_cast<Quarter32*>(to + i) = four;
  } else {
    to[i] = x[0];
  }
}
template <int kCount>
__device__ __forceinline__ void load_16(float (&x)[kCount], const void* from, DType dtype, int64_t i) {
  const uint16_t* bits = static_cast<const uint16_t*>(from) + i;
  if constexpr (kCount == kVector) {
    const Quarter16 four = *reinterpret_cast<const Quarter16*>(bits);
    for (int j = 0; j < kCount; ++j) x[j] = from_16(four.bits[j], dtype);
  } else {
    x[0] = from_16(*bits, dtype);
  }
}
template <int kCount>
__device__ __forceinline__ void store_16(void* to, DType dtype, int64_t i, const float (&x)[kCount]) {
  uint16_t* bits = static_cast<uint16_t*>(to) + i;
  if constexpr (kCount == kVector) {
    Quarter16 four;
    for (int j = 0; j < kCount; ++j) four.bits[j] = to_16(x[j], dtype);
    *reinterpret_cast<Quarter16*>(bits) = four;
  } else {
    *bits = to_16(x[0], dtype);
  }
}

// accumulator + weight * gradient.
template <int kCount>
__device__ __forceinline__ void gather(float (&sum)[kCount], const UpdateTensor& tensor, float weight, int64_t i) {
  for (int j = 0; j < kCount; ++j) sum[j] = 0;
  if (tensor.accumulator) load(sum, tensor.accumulator, i);
  if (!tensor.gradient) return;
  float gradient[kCount];
  if (tensor.gradient_dtype == DType::float32)
    load(gradient, static_cast<const float*>(tensor.gradient), i);
  else
    load_16(gradient, tensor.gradient, tensor.gradient_dtype, i);
  for (int j = 0; j < kCount; ++j) sum[j] += weight * gradient[j];
}

template <int kCount>
__device__ __forceinline__ void update(const UpdateTensor& tensor, const UpdateLevel& level, float weight, float scale,
                                       int64_t i) {
  float g[kCount];
  gather(g, tensor, weight, i);
  if (!level.due) return store(tensor.accumulator, i, g);
  float p[kCount], step[kCount];
  load(p, tensor.parameter, i);
  for (int j = 0; j < kCount; ++j) g[j] *= scale;
  if (level.rule == UpdateRule::sgd) {
    for (int j = 0; j < kCount; ++j) step[j] = level.lr * g[j];
  } else {
    float m[kCount];
    load(m, tensor.first, i);
    if (level.rule == UpdateRule::momentum) {
      for (int j = 0; j < kCount; ++j) {
        m[j] = level.beta1 * m[j] + g[j];
        step[j] = level.lr * (level.nesterov ? g[j] + level.beta1 * m[j] : m[j]);
      }
    } else {
      float v[kCount];
      load(v, tensor.second, i);
      const float lr = level.lr / level.correction1, root = 1 / sqrtf(level.correction2);
      for (int j = 0; j < kCount; ++j) {
        m[j] = level.beta1 * m[j] + level.gain1 * g[j];
        v[j] = level.beta2 * v[j] + level.gain2 * g[j] * g[j];
        step[j] = lr * m[j] / (sqrtf(v[j]) * root + level.eps);
      }
      store(tensor.second, i, v);
    }
    store(tensor.first, i, m);
  }
  const float kept = 1 - level.lr * tensor.decay;
  for (int j = 0; j < kCount; ++j) p[j] = kept * p[j] - step[j];
  store(tensor.parameter, i, p);
  if (tensor.copy) store_16(tensor.copy, tensor.copy_dtype, i, p);
  if (tensor.accumulator) {
    for (int j = 0; j < kCount; ++j) g[j] = 0;
    store(tensor.accumulator, i, g);
  }
}

// Whether groups of kVector elements may be moved at once; pieces start at multiples of kVector.
__device__ bool aligned(const UpdateTensor& tensor) {
  const uintptr_t wide = reinterpret_cast<uintptr_t>(tensor.parameter) | reinterpret_cast<uintptr_t>(tensor.accumulator) |
                         reinterpret_cast<uintptr_t>(tensor.first) | reinterpret_cast<uintptr_t>(tensor.second);
  const uintptr_t gradient = reinterpret_cast<uintptr_t>(tensor.gradient);
  const bool wide_gradient = tensor.gradient_dtype == DType::float32;
  const uintptr_t narrow = reinterpret_cast<uintptr_t>(tensor.copy) | (wide_gradient ? 0 : gradient);
  return (wide | (wide_gradient ? gradient : 0)) % sizeof(Quarter32) == 0 && narrow % sizeof(Quarter16) == 0;
}

// Calls body(Count<n>, i) for the elements of a piece, n of them from i on: groups first, in an order that depends on the
// tensor alone.
template <int kCount>
struct Count {
  static constexpr int value = kCount;
};
template <class F>
__device__ __forceinline__ void for_each_element(const UpdateTensor& tensor, int64_t piece, const F& body) {
  const int64_t first = (piece - tensor.first_piece) * kPieceElements;
  const int64_t end = first + kPieceElements < tensor.size ? first + kPieceElements : tensor.size;
  int64_t one_by_one = first;
  if (aligned(tensor)) {
    one_by_one = end - (end - first) % kVector;
    for (int64_t i = first + kVector * threadIdx.x; i < one_by_one; i += kVector * kThreads) body(Count<kVector>{}, i);
  }
  for (int64_t i = one_by_one + threadIdx.x; i < end; i += kThreads) body(Count<1>{}, i);
}

// The tensor that a piece belongs to: the last whose first piece is not beyond it and that is not empty.
__device__ int64_t tensor_of(const Arguments& a, int64_t piece) {
  int64_t low = 0, high = a.tensor_count;  // low's first piece <= piece < high's
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (a.tensors[middle].first_piece <= piece ? low : high) = middle;
  }
  return low;
}

// The sum of one value of every thread, the same in all of them.
template <class T>
__device__ T block_sum(T x) {
  Shared& shared = block_shared<Shared>();
  const auto warp = cg::tiled_partition<32>(cg::this_thread_block());
  for (int lanes = 16; lanes > 0; lanes /= 2) x += warp.shfl_xor(x, lanes);
  if (warp.thread_rank() == 0) shared.partial[warp.meta_group_rank()] = x;
  __syncthreads();
  double sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += shared.partial[w];
  __syncthreads();  // before the next call writes
  return T(sum);
}

__device__ bool clips(const Arguments& a, const UpdateLevel& level) {
  return level.due && (a.max_norm > 0 || level.max_norm > 0);
}

// Writes the sum of squares of each piece of the due levels that have a bound.
__device__ void sum_squares(const Arguments& a) {
  for (int64_t piece = blockIdx.x; piece < a.pieces; piece += gridDim.x) {
    const UpdateTensor tensor = a.tensors[tensor_of(a, piece)];
    if (!clips(a, a.levels[tensor.level])) continue;
    float sum = 0;
    for_each_element(tensor, piece, [&](auto count, int64_t i) {
      float x[count.value];
      gather(x, tensor, a.weight, i);
      for (int j = 0; j < count.value; ++j) sum += x[j] * x[j];
    });
    const float total = block_sum(sum);
    if (threadIdx.x == 0) a.sums[piece] = total;
  }
}

// The square of the norm of a level's gathered, scaled gradients.
__device__ double level_square(const Arguments& a, const UpdateLevel& level) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < level.pieces; i += kThreads) sum += a.sums[level.first_piece + i];
  return block_sum(sum) * level.scale * level.scale;
}

__device__ float coefficient(float max_norm, float norm) {
  const float c = max_norm / (norm + 1e-6f);  // as torch.nn.utils.clip_grad_norm_
  return c < 1 ? c : (norm == norm ? 1.0f : norm);
}

// What each level's gathered gradients are multiplied with, in shared memory; block 0 reports the norms.
__device__ const float* level_scales(const Arguments& a) {
  float* scales = dynamic_shared<float>();
  double together = 0;
  for (int64_t l = 0; l < a.level_count; ++l) {
    const UpdateLevel& level = a.levels[l];
    if (!clips(a, level)) {
      if (threadIdx.x == 0) {
        scales[l] = level.scale;
        if (blockIdx.x == 0) a.norms[l] = 0;
      }
      continue;
    }
    const double square = level_square(a, level);
    together += square;
    if (a.max_norm > 0) continue;
    const float norm = float(sqrt(square));
    if (threadIdx.x == 0) {
      scales[l] = level.scale * coefficient(level.max_norm, norm);
      if (blockIdx.x == 0) a.norms[l] = norm;
    }
  }
  if (a.max_norm > 0 && threadIdx.x == 0) {
    const float norm = float(sqrt(together)), common = coefficient(a.max_norm, norm);
    for (int64_t l = 0; l < a.level_count; ++l) {
      if (!clips(a, a.levels[l])) continue;
      scales[l] = a.levels[l].scale * common;
      if (blockIdx.x == 0) a.norms[l] = norm;
    }
  }
  __syncthreads();
  return scales;
}

template <bool kClips>
__global__ void __launch_bounds__(kThreads) level_update_kernel(const Arguments a) {
  const float* scales = nullptr;
  if constexpr (kClips) {
    sum_squares(a);
    cg::this_grid().sync();
    scales = level_scales(a);
  } else if (blockIdx.x == 0) {
    for (int64_t l = threadIdx.x; l < a.level_count; l += kThreads) a.norms[l] = 0;
  }
  for (int64_t piece = blockIdx.x; piece < a.pieces; piece += gridDim.x) {
    const UpdateTensor tensor = a.tensors[tensor_of(a, piece)];
    const UpdateLevel level = a.levels[tensor.level];
    const float scale = kClips ? scales[tensor.level] : level.scale;
    for_each_element(tensor, piece, [&](auto count, int64_t i) { update<count.value>(tensor, level, a.weight, scale, i); });
  }
}

// The workspace: tensors, levels, sums, each at a multiple of 16 bytes.
struct Layout {
  int64_t levels, sums, bytes;
  Layout(int64_t tensor_count, int64_t level_count, int64_t pieces) {
    const auto rounded = [](int64_t bytes) { return (bytes + 15) / 16 * 16; };
    levels = rounded(tensor_count * int64_t(sizeof(UpdateTensor)));
    sums = levels + rounded(level_count * int64_t(sizeof(UpdateLevel)));
    bytes = sums + rounded(pieces * int64_t(sizeof(float)));
  }
};

bool any_clips(const LevelUpdateProblem& p) {
  for (int64_t l = 0; l < p.level_count; ++l)
    if (clips(p, p.levels[l])) return true;
  return false;
}

// Copies of up to 64 KiB from ordinary host memory do not wait for the device.
cudaError_t upload(unsigned char* to, const void* from, size_t bytes, cudaStream_t queue) {
  constexpr size_t kAtOnce = 64 << 10;
  for (size_t at = 0; at < bytes; at += kAtOnce) {
    const size_t count = bytes - at < kAtOnce ? bytes - at : kAtOnce;
    const cudaError_t error = cudaMemcpyAsync(to + at, static_cast<const unsigned char*>(from) + at, count,
                                              cudaMemcpyHostToDevice, queue);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

constexpr int64_t kMaxLevels = 4096;  // their scales fit the shared memory every launch may have

}  // namespace

int64_t level_update_workspace(int64_t tensors, int64_t levels, int64_t pieces) {
  return Layout(tensors, levels, pieces).bytes;
}

Status level_update(const LevelUpdateProblem& problem, void* workspace, int64_t workspace_bytes, int device,
                    void* stream) {
  // Host checks.
  const Status status = check(problem);
  if (status.code != StatusCode::ok) return status;
  if (problem.level_count > kMaxLevels) return {StatusCode::invalid_argument, "at most 4096 levels"};
  const Layout layout(problem.tensor_count, problem.level_count, total_pieces(problem));
  if (layout.bytes > 0 && (!workspace || workspace_bytes < layout.bytes))
    return {StatusCode::invalid_argument, "the workspace is missing or too small"};
  const auto work = static_cast<unsigned char*>(workspace);
  const auto queue = static_cast<cudaStream_t>(stream);

  // Early return: without elements there is nothing to do but to say that norms are 0.
  if (problem.level_count == 0) return {};
  cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return status_of(error, "level_update chooses its device");
  if (total_pieces(problem) == 0)
    return status_of(cudaMemsetAsync(problem.norms, 0, size_t(problem.level_count) * sizeof(float), queue),
                     "level_update clears the norms");
  Arguments arguments{reinterpret_cast<const UpdateTensor*>(work),
                      reinterpret_cast<const UpdateLevel*>(work + layout.levels),
                      problem.tensor_count,
                      problem.level_count,
                      total_pieces(problem),
                      problem.weight,
                      problem.max_norm,
                      reinterpret_cast<float*>(work + layout.sums),
                      problem.norms};

  // Dispatch.
  error = upload(work, problem.tensors, size_t(problem.tensor_count) * sizeof(UpdateTensor), queue);
  if (error == cudaSuccess)
    error = upload(work + layout.levels, problem.levels, size_t(problem.level_count) * sizeof(UpdateLevel), queue);
  if (error != cudaSuccess) return status_of(error, "level_update copies its tables");
  const bool bounded = any_clips(problem);
  const auto kernel = bounded ? level_update_kernel<true> : level_update_kernel<false>;
  LaunchShape shape;
  shape.block = kThreads;
  shape.shared_bytes = bounded ? size_t(problem.level_count) * sizeof(float) : 0;
  shape.cooperative = bounded;
  shape.stream = queue;
  // As many blocks as run at once: a grid barrier allows no more, and no block then waits for its turn.
  int multiprocessors = 0, blocks = 0;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shape.shared_bytes);
  if (error != cudaSuccess) return status_of(error, "level_update asks what the device holds");
  if (blocks < 1) return {StatusCode::unsupported, "level_update: this device holds no block of the kernel"};
  const int64_t together = int64_t(blocks) * multiprocessors;
  shape.grid = unsigned(arguments.pieces < together ? arguments.pieces : together);
  return launch("level_update", shape, kernel, arguments);
}

}  // namespace hope::cuda
