// The PTX instructions the kernels use, one small named function each; shared memory is asked for here as well.
//
// A kernel includes this file as "cuda/ptx.h", never by a path relative to itself, and names no other PTX: the tests compile
// the same kernels for the CPU with a file of that name that supplies the same functions (tests/cuda_host/include/cuda/ptx.h).
//
// Fragments, in the terms of the PTX ISA, with g = lane / 4 and t = lane % 4:
//   accumulator of m16n8       d[0..1] = D[g][2t..2t+1]    d[2..3] = D[g + 8][2t..2t+1]
//   16-bit A of m16n8k16       a[0] = A[g][2t..2t+1]       a[1] = A[g + 8][2t..]     a[2], a[3]: the same, 8 columns on
//   16-bit B of m16n8k16       b[0] = B[2t..2t+1][g]       b[1] = B[2t + 8..2t + 9][g]
//   tf32 A of m16n8k8          a[0] = A[g][t]              a[1] = A[g + 8][t]        a[2], a[3]: the same, 4 columns on
//   tf32 B of m16n8k8          b[0] = B[t][g]              b[1] = B[t + 4][g]
// Of a pair in one register the first element lies in the low half.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace hope::cuda {

// The block's dynamic shared memory, aligned to 128 bytes: the size is the launch's.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// The block's one object of type T in static shared memory, uninitialised. Asking twice gives the same object.
template <class T>
__device__ __forceinline__ T& block_shared() {
  __shared__ T object;
  return object;
}

// x. The compiler cannot tell: what follows from the result is computed where it is used, instead of once in front of a loop
// to be held in registers.
__device__ __forceinline__ unsigned opaque(unsigned x) {
  asm volatile("" : "+r"(x));
  return x;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// d += a b, float32 accumulation. All 32 lanes take part; no memory is ordered.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Of each operand the upper 19 bits count; to_tf32 rounds to them.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The float32 bits of x rounded to tf32, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Loads kCount (1, 2 or 4) 8x8 matrices of 16-bit elements from shared memory. Lane 8j + i passes the address of row i of
// matrix j, 16 bytes aligned to 16. r[j] = M_j[g][2t..2t+1]. All 32 lanes take part; what other lanes wrote must have been
// ordered before by a barrier.
template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the instruction loads 1, 2 or 4 matrices");
  const uint32_t address = shared_address(row);
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// The same, each matrix transposed: r[j] = M_j[2t..2t+1][g].
template <int kCount>
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "the instruction loads 1, 2 or 4 matrices");
  const uint32_t address = shared_address(row);
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
// Transposes an 8x8 matrix of 16-bit elements held as M[g][2t..2t+1]. All 32 lanes take part.
__device__ __forceinline__ uint32_t movmatrix(uint32_t m) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(m));
  return transposed;
}

// Starts a copy of 16 bytes to shared memory, both sides aligned to 16; with `valid` false zeros are written and `global` is
// not read. The copy is there for this thread after cp_async_wait, for others after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               : : "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
}
// Closes a group of this thread's copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kGroups of this thread's latest groups are unfinished.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kGroups) : "memory");
}

// Waits for all threads of all blocks of the cluster. sm_90 and up.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What lies at `shared`, an address of this block's, in block `rank` of the cluster. sm_90 and up.
__device__ __forceinline__ float4 cluster_load(const float4* shared, int rank) {
  uint32_t address;
  float4 x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ float cluster_load(const float* shared, int rank) {
  uint32_t address;
  float x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads of the block, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}
// Counts as one of its threads without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("barrier.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

}  // namespace hope::cuda
