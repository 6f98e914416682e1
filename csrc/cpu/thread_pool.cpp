// The threads that share the work of a call, and each thread's scratch memory.
//
// PyTorch's OpenMP workers spin for milliseconds after each of its operators. A second set of threads would share the cores
// with them (measured on two cores: 4 ms of a 15 ms call), so a call runs on those very workers where this process has an
// OpenMP runtime, found by the name of GCC's entry point, which the LLVM and Intel runtimes have too. Where there is none,
// and in a forked child, whose copy of the runtime waits for workers that stayed with the parent, the engine has workers of
// its own. They spin briefly for the next call and then sleep: calls arrive every few hundred microseconds in a training
// step, and waking a sleeping thread would cost a visible part of that.
#include "thread_pool.h"

#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hope::cpu {
namespace {

constexpr int kSpins = 2000;  // about 50 microseconds of pause instructions
constexpr size_t kKeepScratch = size_t(512) << 20;  // faulting it in anew took about 4 % of a large memory's call
constexpr size_t kHugePage = size_t(2) << 20;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  PieceFunction function;
  void* context;
  int64_t pieces;
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < pieces;
         i = next.fetch_add(1, std::memory_order_relaxed))
      function(context, i);
  }
};

thread_local bool inside_piece = false;

void work_inside(Job& job) {
  inside_piece = true;
  job.work();
  inside_piece = false;
}

// void GOMP_parallel(void (*function)(void*), void* data, unsigned threads, unsigned flags): the caller and the workers of
// its team all run function(data).
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The process that loaded the engine, which may be forked before its first call.
const pid_t loaded_by = getpid();

// Null in a forked child.
OpenMPParallel openmp_parallel() {
  static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == loaded_by ? found : nullptr;
}

class Pool {
 public:
  explicit Pool(pid_t owner) : owner_(owner) {}
  pid_t owner() const { return owner_; }

  // True when the job was run; false when the workers belong to another call.
  bool run(Job& job, int threads) {
    std::unique_lock<std::mutex> exclusive(busy_, std::try_to_lock);
    if (!exclusive.owns_lock()) return false;
    grow(threads - 1);
    const int helpers = threads - 1 < int(workers_) ? threads - 1 : int(workers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = helpers;
      unfinished_.store(helpers, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    work_inside(job);
    // The last pieces are as long as ours were: spin, then give way.
    for (int spin = 0; unfinished_.load(std::memory_order_acquire) > 0; ++spin)
      spin < kSpins ? relax() : std::this_thread::yield();
    return true;
  }

 private:
  void grow(int wanted) {
    while (int(workers_) < wanted) {
      const int id = workers_;
      try {
        std::thread([this, id] { serve(id); }).detach();
      } catch (...) {
        return;  // fewer threads compute the same values
      }
      ++workers_;
    }
  }

  void serve(int id) {
    inside_piece = true;
    uint64_t seen = 0;
    for (;;) {
      int spin = 0;
      while (generation_.load(std::memory_order_acquire) == seen && spin < kSpins) ++spin, relax();
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        if (generation_.load(std::memory_order_relaxed) == seen) {
          sleeping_.fetch_add(1);
          wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
          sleeping_.fetch_sub(1);
        }
        seen = generation_.load(std::memory_order_relaxed);
        if (id < wanted_) job = job_;
      }
      if (job) {
        job->work();
        unfinished_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

  const pid_t owner_;
  std::mutex busy_;   // held by the call that uses the workers
  std::mutex mutex_;  // guards job_, wanted_ and the change of generation_
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<int> unfinished_{0};
  Job* job_ = nullptr;
  int wanted_ = 0;
  int workers_ = 0;
};

// Never destroyed: workers may still sleep in it when the process ends, and a forked child cannot join its parent's.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  Pool* found = current.load(std::memory_order_acquire);
  const pid_t pid = getpid();
  while (!found || found->owner() != pid) {
    Pool* fresh = new Pool(pid);
    if (current.compare_exchange_strong(found, fresh, std::memory_order_acq_rel)) return *fresh;
    delete fresh;
  }
  return *found;
}

struct Scratch {
  void* data = nullptr;
  size_t capacity = 0;
  ~Scratch() { std::free(data); }
};
thread_local Scratch scratch;

}  // namespace

void parallel_for(int threads, int64_t pieces, PieceFunction function, void* context) {
  Job job{function, context, pieces};
  if (threads < 2 || pieces < 2 || inside_piece) return job.work();
  if (const OpenMPParallel parallel = openmp_parallel()) {
    // A call from another thread would get a team of its own: more threads than cores.
    static std::mutex busy;
    const std::unique_lock<std::mutex> exclusive(busy, std::try_to_lock);
    if (!exclusive.owns_lock()) return job.work();
    // Never a smaller team, however few the pieces: GCC's runtime ends the threads that a team lacks.
    return parallel([](void* data) { work_inside(*static_cast<Job*>(data)); }, &job, unsigned(threads), 0);
  }
  if (!pool().run(job, threads < pieces ? threads : int(pieces))) job.work();
}

void* thread_scratch(size_t bytes) {
  if (bytes > scratch.capacity) {
    std::free(scratch.data);
    const size_t unit = bytes >= kHugePage / 8 ? kHugePage : size_t(4096);
    const size_t capacity = (bytes + unit - 1) / unit * unit;
    scratch.data = std::aligned_alloc(unit, capacity);
    scratch.capacity = scratch.data ? capacity : 0;
#if defined(__linux__)
    if (scratch.data && unit == kHugePage) madvise(scratch.data, capacity, MADV_HUGEPAGE);
#endif
  }
  return scratch.data;
}

void trim_thread_scratch() {
  if (scratch.capacity > kKeepScratch) {
    std::free(scratch.data);
    scratch.data = nullptr;
    scratch.capacity = 0;
  }
}

}  // namespace hope::cpu
