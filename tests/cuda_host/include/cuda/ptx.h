// The functions of csrc/cuda/ptx.h for the host layer: the same names and meanings, on the CPU. Their documentation is there.
//
// Tensor core products are summed exactly enough (float64) and rounded to float32 once; the hardware rounds oftener.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_runtime.h"

namespace hope::cuda {

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_host::dynamic_shared());
}

// Reserved before main: a first call in a kernel would order its threads.
template <class T>
struct StaticShared {
  static inline const size_t offset = cuda_host::reserve_static_shared(sizeof(T));
};
template <class T>
T& block_shared() {
  return *reinterpret_cast<T*>(cuda_host::static_shared(StaticShared<T>::offset));
}

inline unsigned opaque(unsigned x) { return x; }

namespace host {

constexpr unsigned kWholeWarp = 0xffffffffu;

inline double bf16_half(uint32_t pair, int half) {
  return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(pair >> 16 * half)));
}
inline double f16_half(uint32_t pair, int half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16 * half)));
}
inline double tf32_value(uint32_t bits, int) { return cuda_host::from_word<float>(bits & 0xffffe000u); }

// kHalves elements to a register; one register spans the k indices kHalves * t + h, the next 4 * kHalves further on.
template <int kHalves, class Element>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Element& element, const cuda_host::Site& site) {
  const uint64_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const cuda_host::Rendezvous& met = cuda_host::meet(kWholeWarp, mine, 6, false, site);
  const int lane = cuda_host::self().lane(), g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * t + i % 2;
    double sum = d[i];
    for (int part = 0; part < 2; ++part)
      for (int k = 0; k < 4; ++k) {
        const uint32_t left = uint32_t(met.get(g * 4 + k, 2 * part + lower, lane));
        const uint32_t right = uint32_t(met.get(column * 4 + k, 4 + part, lane));
        for (int h = 0; h < kHalves; ++h) sum += element(left, h) * element(right, h);
      }
    d[i] = float(sum);
  }
}

template <int kCount, bool kTransposed>
void load_matrices(uint32_t (&r)[kCount], const void* row, const cuda_host::Site& site) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the instruction loads 1, 2 or 4 matrices");
  const uint64_t mine = reinterpret_cast<uintptr_t>(row);
  const int lane = cuda_host::self().lane(), g = lane / 4, t = lane % 4;
  if (lane < 8 * kCount && mine % 16 != 0)
    cuda_host::die("ldmatrix at %s:%d: a row that is not aligned to 16 bytes", site.file, site.line);
  const cuda_host::Rendezvous& met = cuda_host::meet(kWholeWarp, &mine, 1, false, site);
  // Each lane reads what it receives, so that a missing barrier between the writer and this lane is seen.
  for (int j = 0; j < kCount; ++j) {
    uint32_t pair = 0;
    for (int h = 0; h < 2; ++h) {
      const int from_row = kTransposed ? 2 * t + h : g, column = kTransposed ? g : 2 * t + h;
      const auto* address = reinterpret_cast<const uint16_t*>(uintptr_t(met.get(8 * j + from_row, 0, lane)));
      pair |= uint32_t(address[column]) << 16 * h;
    }
    r[j] = pair;
  }
}

}  // namespace host

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_HOST_SITE) {
  host::mma<2>(d, a, b, host::bf16_half, {"mma_bf16", file, line});
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_HOST_SITE) {
  host::mma<2>(d, a, b, host::f16_half, {"mma_f16", file, line});
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_HOST_SITE) {
  host::mma<1>(d, a, b, host::tf32_value, {"mma_tf32", file, line});
}
inline uint32_t to_tf32(float x) {
  const uint32_t bits = uint32_t(cuda_host::to_word(x));
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

template <int kCount>
void ldmatrix(uint32_t (&r)[kCount], const void* row, CUDA_HOST_SITE) {
  host::load_matrices<kCount, false>(r, row, {"ldmatrix", file, line});
}
template <int kCount>
void ldmatrix_transposed(uint32_t (&r)[kCount], const void* row, CUDA_HOST_SITE) {
  host::load_matrices<kCount, true>(r, row, {"ldmatrix_transposed", file, line});
}
inline uint32_t movmatrix(uint32_t m, CUDA_HOST_SITE) {
  const uint64_t mine = m;
  const cuda_host::Rendezvous& met = cuda_host::meet(host::kWholeWarp, &mine, 1, false, {"movmatrix", file, line});
  const int lane = cuda_host::self().lane(), g = lane / 4, t = lane % 4;
  uint32_t pair = 0;
  for (int h = 0; h < 2; ++h)
    pair |= (uint32_t(met.get((2 * t + h) * 4 + g / 2, 0, lane)) >> 16 * (g % 2) & 0xffffu) << 16 * h;
  return pair;
}

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
  cuda_host::async_copy(shared, global, valid);
}
inline void cp_async_commit() { cuda_host::async_commit(); }
template <int kGroups>
void cp_async_wait() {
  cuda_host::async_wait(kGroups);
}

inline void cluster_sync(CUDA_HOST_SITE) { cuda_host::cluster_barrier({"cluster_sync", file, line}); }
template <class T>
T cluster_load(const T* shared, int rank) {
  return *static_cast<const T*>(cuda_host::map_shared_rank(shared, unsigned(rank)));
}

inline cuda_host::Barrier& named_barrier(int id, int threads, const cuda_host::Site& site) {
  if (id < 1 || id > 15 || threads < 32 || threads % 32 != 0)
    cuda_host::die("%s at %s:%d: barrier %d of %d threads; want 1 to 15 and a multiple of 32", site.name, site.file,
                   site.line, id, threads);
  return cuda_host::self().block->named[id];
}
inline void named_barrier_sync(int id, int threads, CUDA_HOST_SITE) {
  const cuda_host::Site site{"named_barrier_sync", file, line};
  named_barrier(id, threads, site).meet(site, uint32_t(threads));
}
inline void named_barrier_arrive(int id, int threads, CUDA_HOST_SITE) {
  const cuda_host::Site site{"named_barrier_arrive", file, line};
  named_barrier(id, threads, site).arrive(cuda_host::orders_memory(site), uint32_t(threads));
}

}  // namespace hope::cuda
