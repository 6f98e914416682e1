// Worker threads that spin briefly for the next call and then sleep, and each thread's scratch memory.
//
// Calls arrive every few hundred microseconds in a training step: waking a sleeping thread would cost a visible part of
// that, spinning for long would take the core from PyTorch's own threads. After fork the child has no workers; it notices
// by its process id and starts its own.
#include "thread_pool.h"

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
    inside_piece = true;
    job.work();
    inside_piece = false;
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
  if (threads > pieces) threads = int(pieces);
  if (threads > 1 && !inside_piece && pool().run(job, threads)) return;
  job.work();
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
