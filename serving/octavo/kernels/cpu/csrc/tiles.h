// The processor's tile registers (AMX): eight of up to 16 rows of 64 bytes, and a product of two that adds 64 bytes of each row
// of one with each column of the other to a third, exactly. Compiled into the AVX-512 library where the compiler knows them;
// used only by a pool whose process has the kernel's permission. The instructions are spelled out, so that no function around
// them needs flags of its own.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "common.h"

#if defined(__AVX512VNNI__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define OCTAVO_TILES 1
#endif

namespace octavo {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;  // of a row

#ifdef OCTAVO_TILES

// Asks Linux to save tile registers for this process, once and for all its threads. False: not here.
inline bool request_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Eight full tiles, but for the rows named otherwise.
struct TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig() {
    for (int tile = 0; tile < 8; ++tile) row_bytes[tile] = kTileBytes, rows[tile] = kTileRows;
  }
};
static_assert(sizeof(TileConfig) == 64);

// Tile registers hold what it says from here to `release_tiles`; a thread that leaves them configured is slower to switch.
OCTAVO_INLINE void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
OCTAVO_INLINE void release_tiles() { asm volatile("tilerelease"); }

template <int T>
OCTAVO_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
OCTAVO_INLINE void load_tile(const void* data, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(T) : "memory");
}

template <int T>
OCTAVO_INLINE void store_tile(void* data, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(T) : "memory");
}

// Sums += rows of unsigned bytes · columns of signed ones.
template <int Sums, int Rows, int Columns>
OCTAVO_INLINE void dot_tiles() {
  asm volatile("tdpbusd %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(Columns), "i"(Rows), "i"(Sums));
}

// The same with rows of signed bytes.
template <int Sums, int Rows, int Columns>
OCTAVO_INLINE void dot_signed_tiles() {
  asm volatile("tdpbssd %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(Columns), "i"(Rows), "i"(Sums));
}

#else

inline bool request_tiles() { return false; }

#endif

}  // namespace octavo
