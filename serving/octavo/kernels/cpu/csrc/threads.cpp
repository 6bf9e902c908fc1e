#include "threads.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <new>

#include "common.h"
#include "tiles.h"

namespace octavo {
namespace {

constexpr uint32_t kOpen = 1u << 31;
constexpr int kSpins = 4000;       // of a worker before it sleeps: some 50 to 100 microseconds
constexpr int kFinishSpins = 200;  // of the caller before it yields to a worker that lost its core

long futex(std::atomic<uint32_t>* word, int operation, uint32_t value) {
  return syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

Pool::Pool(int num_threads, bool has_tiles)
    : num_threads_(num_threads), has_tiles_(has_tiles), process_(getpid()), scratch_(num_threads), tiles_(new Tiles[num_threads]) {
  for (int thread = 1; thread < num_threads; ++thread) {
    workers_.emplace_back([this, thread] { work(thread); });
  }
}

Pool::~Pool() {
  stopping_.store(true);
  epoch_.fetch_add(1);
  futex(&epoch_, FUTEX_WAKE, INT_MAX);
  for (std::thread& worker : workers_) worker.join();
  for (Scratch& scratch : scratch_) std::free(scratch.data);
}

bool Pool::made_here() const { return process_ == getpid(); }

void Pool::run(int64_t num_tiles, Body body, void* context) {
  if (num_threads_ == 1 || num_tiles <= 1) {
    for (int64_t tile = 0; tile < num_tiles; ++tile) body(context, tile, 0);
    return;
  }
  body_ = body;
  context_ = context;
  for (int64_t thread = 0; thread < num_threads_; ++thread) {
    const uint64_t first = num_tiles * thread / num_threads_, end = num_tiles * (thread + 1) / num_threads_;
    tiles_[thread].left.store(end << 32 | first, std::memory_order_relaxed);
  }
  state_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1);
  if (sleepers_.load() > 0) futex(&epoch_, FUTEX_WAKE, INT_MAX);
  drain(0);
  // Closing first means that a worker without a core is not waited for: only one that holds a tile is.
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; state_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < kFinishSpins) _mm_pause();
    else sched_yield();
  }
}

void Pool::drain(int thread) {
  int64_t tile;
  while (take(thread, false, &tile)) body_(context_, tile, thread);
  for (int other = 1; other < num_threads_; ++other)
    while (take((thread + other) % num_threads_, true, &tile)) body_(context_, tile, thread);
}

// The first or last tile that is left of a thread's run.
bool Pool::take(int from, bool last, int64_t* tile) {
  std::atomic<uint64_t>& run = tiles_[from].left;
  uint64_t left = run.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t first = left & 0xffffffff, end = left >> 32;
    if (first == end) return false;
    *tile = static_cast<int64_t>(last ? end - 1 : first);
    const uint64_t rest = last ? (end - 1) << 32 | first : end << 32 | (first + 1);
    if (run.compare_exchange_weak(left, rest, std::memory_order_relaxed)) return true;
  }
}

bool Pool::enter() {
  uint32_t state = state_.load(std::memory_order_acquire);
  while (state & kOpen) {
    if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) return true;
  }
  return false;
}

uint32_t Pool::wait_for_job(uint32_t seen) {
  for (int spins = 0; spins < kSpins; ++spins) {
    uint32_t epoch = epoch_.load(std::memory_order_acquire);
    if (epoch != seen) return epoch;
    _mm_pause();
  }
  sleepers_.fetch_add(1);
  while (epoch_.load() == seen) futex(&epoch_, FUTEX_WAIT, seen);
  sleepers_.fetch_sub(1);
  return epoch_.load();
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  while (!stopping_.load()) {
    seen = wait_for_job(seen);
    if (!enter()) continue;
    drain(thread);
    state_.fetch_sub(1, std::memory_order_acq_rel);
  }
}

char* Pool::scratch(int thread, size_t bytes) {
  Scratch& mine = scratch_[thread];
  if (mine.bytes < bytes) {
    std::free(mine.data);
    mine.bytes = (bytes + 4095) / 4096 * 4096;
    mine.data = static_cast<char*>(std::aligned_alloc(64, mine.bytes));
    if (mine.data == nullptr) throw std::bad_alloc();
  }
  return mine.data;
}

}  // namespace octavo

// -> a handle for the first argument of every other function; null if `tiles` are asked for and not to be had.
OCTAVO_API octavo::Pool* octavo_pool_create(int64_t num_threads, int64_t tiles) {
  if (tiles != 0 && !octavo::request_tiles()) return nullptr;
  return new octavo::Pool(static_cast<int>(num_threads), tiles != 0);
}

// In a forked child the workers do not exist, and there is nothing to end.
OCTAVO_API void octavo_pool_destroy(octavo::Pool* pool) {
  if (pool->made_here()) delete pool;
}
