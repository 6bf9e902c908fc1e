// Fetching of an int8 cache ahead of its use.
#pragma once

#include <algorithm>

#include "attention_state.h"

namespace octavo {

// What comes later, fetched into the second cache all through the work on a tile: more lines at once than the core can wait for
// would keep its vectors waiting too. Both halves of K and V take turns, since the processor reads ahead by itself in every page
// of 4 kB that it sees in use.
class CacheFetch {
 public:
  // `turns`: how many all steps together take.
  CacheFetch(const TileView& tile, const CacheView& cache, int64_t turns) {
    for (int half = 0; half < 2; ++half) {
      const auto seen = [&](int64_t tokens) { return std::clamp<int64_t>(tokens - half * kBlock, 0, kBlock); };
      at_[half] = tile.next_k[half], bytes_[half] = num_tiles(seen(tile.next_k_tokens), kPanel) * cache.k_panel();
      at_[2 + half] = tile.next_v[half], bytes_[2 + half] = num_tiles(seen(tile.next_v_tokens), kQuad) * cache.v_quad();
    }
    for (int64_t bytes : bytes_) most_ = std::max(most_, bytes);
    times_ = num_tiles(most_, turns * kLine);
  }

  // kTurns turns, or as many times that as it takes to be done with all steps; a turn is a line of each.
  template <int kTurns>
  OCTAVO_INLINE void step() {
    if (offset_ >= most_) return;
    for (int64_t turn = kTurns * times_; turn > 0; --turn) take();
  }

  // The same for many small steps, once in a while.
  OCTAVO_INLINE void tick(int64_t every) {
    if (--wait_ > 0) return;
    wait_ = every;
    step<1>();
  }

  void finish() {
    while (offset_ < most_) take();
  }

 private:
  static constexpr int64_t kLine = 64;

  OCTAVO_INLINE void take() {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      if (offset_ < bytes_[i]) __builtin_prefetch(at_[i] + offset_, 0, 2);
    offset_ += kLine;
  }

  const char* at_[4];
  int64_t bytes_[4], most_ = 0;
  int64_t offset_ = 0, times_, wait_ = 1;
};

}  // namespace octavo
