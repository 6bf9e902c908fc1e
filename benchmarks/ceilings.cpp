// What the machine allows, for the ratios of cpu.py: bytes read per second from memory, and int8 operations per second of the
// bare instructions that products can be made of. Usage: ceilings THREADS SECONDS; prints three numbers: GB/s, GOPS of
// vpdpbusd (AVX-512 VNNI) and GOPS of tdpbusd (AMX tiles; 0 where the processor or the kernel does not give them).
#include <cpuid.h>
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr size_t kBytes = size_t{1} << 30;  // as much as the model: of less, a large last cache keeps a part
std::atomic<int64_t> sink{0};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Reads [first, last) in four streams, as the products read their panels, each fetched kAhead bytes ahead, and before that kFar
// bytes ahead into the second cache, if that is not 0.
template <size_t kAhead, size_t kFar>
void read_part(const char* data, size_t first, size_t last) {
  __m512i sums[4] = {};
  const size_t quarter = (last - first) / 4 / 64 * 64;
  for (size_t at = 0; at < quarter; at += 64)
    for (int s = 0; s < 4; ++s) {
      const char* p = data + first + s * quarter + at;
      _mm_prefetch(p + kAhead, _MM_HINT_T0);
      if (kFar != 0) _mm_prefetch(p + kFar, _MM_HINT_T1);
      sums[s] = _mm512_xor_si512(sums[s], _mm512_load_si512(p));
    }
  sink += _mm512_reduce_add_epi64(_mm512_xor_si512(_mm512_xor_si512(sums[0], sums[1]), _mm512_xor_si512(sums[2], sums[3])));
}

template <typename F>
void on_threads(int threads, F&& f) {
  std::vector<std::thread> workers;
  for (int t = 0; t < threads; ++t) workers.emplace_back([&f, t] { f(t); });
  for (auto& worker : workers) worker.join();
}

// Parts of 4 MB are taken as threads get to them, so a thread that lost its core holds up little.
template <size_t kAhead, size_t kFar = 0>
double bandwidth(char* data, int threads, double seconds) {
  std::atomic<size_t> next{0};
  const double began = now();
  on_threads(threads, [&](int) {
    while (now() - began < seconds) {
      const size_t at = next.fetch_add(1) % (kBytes >> 22) << 22;
      read_part<kAhead, kFar>(data, at, at + (size_t{1} << 22));
    }
  });
  return static_cast<double>(next.load()) * (1 << 22) / (now() - began) / 1e9;
}

// The best of some ways: which one suits depends on the processor.
double bandwidth(int threads, double seconds) {
  char* data = static_cast<char*>(std::aligned_alloc(size_t{2} << 20, kBytes));
  madvise(data, kBytes, MADV_HUGEPAGE);
  for (size_t at = 0; at < kBytes; at += 64) data[at] = static_cast<char>(at >> 6);
  double best = 0;
  for (double rate : {bandwidth<1024>(data, threads, seconds), bandwidth<2048>(data, threads, seconds),
                      bandwidth<4096>(data, threads, seconds), bandwidth<1024, 4096>(data, threads, seconds)})
    best = rate > best ? rate : best;
  std::free(data);
  return best;
}

// Both kinds of product run registers against themselves for `seconds`; a round is what `work` does in one call.
template <typename F>
double operations(int threads, double seconds, double per_round, F&& work) {
  std::atomic<int64_t> rounds{0};
  const double began = now();
  on_threads(threads, [&](int) { rounds += work(began + seconds); });
  return static_cast<double>(rounds.load()) * per_round / (now() - began) / 1e9;
}

int64_t vector_rounds(double until) {
  typedef int32_t i32x16 __attribute__((vector_size(64)));
  i32x16 acc[16];
  for (int j = 0; j < 16; ++j) {
    acc[j] = i32x16{} + j;
    asm volatile("" : "+v"(acc[j]));  // else the compiler sees sixteen times the same sum
  }
  __m512i a = _mm512_set1_epi32(0x01020304), b = _mm512_set1_epi32(0x04030201);
  int64_t rounds = 0;
  for (; now() < until; rounds += 20000)
    for (int i = 0; i < 20000; ++i) {
      asm volatile("" : "+v"(a), "+v"(b));
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) acc[j] = reinterpret_cast<i32x16>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(acc[j]), a, b));
    }
  for (int j = 0; j < 16; ++j) sink += acc[j][0];
  return rounds;
}

// The processor has int8 tiles, and Linux lets this process use their registers.
bool tiles_allowed() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return (edx & kTile) && (edx & kInt8) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Four sums of 16 x 16 from two tiles of each side, which is as many as the eight registers allow.
__attribute__((target("amx-tile,amx-int8"))) int64_t tile_rounds(double until) {
  const TileShapes shapes;
  alignas(64) static const uint8_t bytes[1024] = {1, 2, 3};
  alignas(64) int32_t sums[256];
  asm volatile("" : : "r"(&shapes) : "memory");  // the intrinsic does not say that it reads all of them
  _tile_loadconfig(&shapes);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, bytes, 64);
  _tile_loadd(5, bytes, 64);
  _tile_loadd(6, bytes, 64);
  _tile_loadd(7, bytes, 64);
  int64_t rounds = 0;
  for (; now() < until; rounds += 2000)
    for (int i = 0; i < 2000; ++i) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
  _tile_stored(0, sums, 64);
  sink += sums[0];
  _tile_release();
  return rounds;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 2;
  const double seconds = argc > 2 ? std::atof(argv[2]) : 1.0;
  const double read = bandwidth(threads, seconds);
  const double vectors = operations(threads, seconds, 16 * 128, vector_rounds);
  const double tiles = tiles_allowed() ? operations(threads, seconds, 4 * 2.0 * 16 * 16 * 64, tile_rounds) : 0;
  std::printf("%.2f %.1f %.1f\n", read, vectors, tiles);
}
