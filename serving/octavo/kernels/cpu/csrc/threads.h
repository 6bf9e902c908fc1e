// A small thread pool. Every thread owns a run of neighbouring tiles, so that it knows what it will read next; one that is
// done takes tiles from the far end of another's, so a stalled core delays one tile, not a static share.
// One thread at a time calls `run`; it works too. Workers spin briefly between calls, then sleep on a futex.
// Which thread computes a tile never changes a result: bodies write disjoint outputs. Threads are not pinned: a worker bound to
// the processor that its caller happens to run on would wait for it, and measured equal at best.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace octavo {

class Pool {
 public:
  using Body = void (*)(void* context, int64_t tile, int thread);

  Pool(int num_threads, bool has_tiles);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return num_threads_; }

  // Whether its threads may use tile registers (tiles.h).
  bool has_tiles() const { return has_tiles_; }

  // False in a child that this process forked later.
  bool made_here() const;

  // Calls body(context, tile, thread) for every tile in [0, num_tiles), thread in [0, num_threads). Returns when all are done.
  void run(int64_t num_tiles, Body body, void* context);

  // At least `bytes` of 64-byte aligned memory that belongs to `thread` until its next call of scratch. For use in bodies.
  char* scratch(int thread, size_t bytes);

 private:
  void work(int thread);
  void drain(int thread);
  bool take(int from, bool last, int64_t* tile);
  bool enter();
  uint32_t wait_for_job(uint32_t seen);

  // Tiles that are left of a thread's run: first in the low half, end in the high half.
  struct alignas(64) Tiles {
    std::atomic<uint64_t> left{0};
  };

  struct Scratch {
    char* data = nullptr;
    size_t bytes = 0;
  };

  int num_threads_;
  bool has_tiles_;
  int process_;
  std::vector<std::thread> workers_;
  std::vector<Scratch> scratch_;
  std::unique_ptr<Tiles[]> tiles_;
  Body body_ = nullptr;
  void* context_ = nullptr;
  std::atomic<bool> stopping_{false};
  alignas(64) std::atomic<uint32_t> state_{0};  // kOpen while tiles may be taken, plus the number of workers inside
  alignas(64) std::atomic<uint32_t> epoch_{0};  // changes with every job; workers sleep on it
  alignas(64) std::atomic<uint32_t> sleepers_{0};
};

// parallel_for(pool, n, [&](int64_t tile, int thread) { ... })
template <typename F>
void parallel_for(Pool* pool, int64_t num_tiles, F&& body) {
  pool->run(
      num_tiles, [](void* context, int64_t tile, int thread) { (*static_cast<std::remove_reference_t<F>*>(context))(tile, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace octavo
