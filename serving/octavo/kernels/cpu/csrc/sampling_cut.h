// Finds where a descending order would be cut, without sorting: the shortest prefix in (z descending, position
// ascending) whose weight reaches a target. Three passes over the row's exponentials narrow the range in which the cut
// lies; among the few entries within it a three-way quickselect finds it.
#pragma once

#include <algorithm>

#include "sampling_math.h"

namespace octavo {

// Kept: every z above `z`, and of the `equal` ones of that value the first `ties`.
struct Cut {
  float z;
  int64_t ties;
  int64_t equal;
};

struct Weighted {
  float z;
  double weight;
};

// The cut among `entries`, `before` being the weight of everything above them.
inline Cut cut_within(Weighted* entries, int64_t count, double before, double target) {
  for (;;) {
    const float pivot = entries[count / 2].z;
    double above = 0.0, equal = 0.0, one = 0.0;
    int64_t num_equal = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (entries[i].z > pivot) above += entries[i].weight;
      if (entries[i].z == pivot) one = entries[i].weight, equal += one, ++num_equal;
    }
    const bool higher = before + above >= target;
    if (!higher && (before + above + equal >= target || num_equal == count)) {
      double sum = before + above;
      int64_t ties = 0;
      while (ties < num_equal && sum < target) sum += one, ++ties;
      return {pivot, ties, num_equal};
    }
    Weighted* stop = std::partition(entries, entries + count,
                                    [&](const Weighted& entry) { return higher ? entry.z > pivot : entry.z < pivot; });
    if (stop == entries) return {pivot, num_equal, num_equal};  // only by rounding of the sums
    if (!higher) before += above + equal;
    count = stop - entries;
  }
}

// Where the cut lies: among the e in (low, high], `before` being the weight of those above.
struct Range {
  double low, high, before;
};

constexpr int kBounds = 7;  // tried in one pass over the row
constexpr int kPasses = 3;

// Weight of everything above each of `bounds`: e itself, or 1 each.
template <bool kCount>
void weigh_above(const double* e, int64_t size, const double* bounds, double* sums) {
  Wide totals[kBounds] = {}, limits[kBounds];
  for (int j = 0; j < kBounds; ++j) limits[j] = wide(bounds[j]);
  int64_t i = 0;
  for (; i + kWide <= size; i += kWide) {
    Wide v;
    std::memcpy(&v, e + i, sizeof(v));
#pragma GCC unroll 7
    for (int j = 0; j < kBounds; ++j) totals[j] = wide_add_above(totals[j], kCount ? wide(1.0) : v, v, limits[j]);
  }
  for (int j = 0; j < kBounds; ++j) {
    double lanes[kWide];
    std::memcpy(lanes, &totals[j], sizeof(lanes));
    sums[j] = 0.0;
    for (double lane : lanes) sums[j] += lane;
    for (int64_t k = i; k < size; ++k)
      if (e[k] > bounds[j]) sums[j] += kCount ? 1.0 : e[k];
  }
}

// Narrows (0, 1] to where the cut is. Bounds are even in log e, but for the first pass, which halves the depth again and
// again since most of the weight lies near the top. Nothing below e^-depth is needed, or has to be told apart.
template <bool kCount>
Range narrow(const double* e, int64_t size, double depth, double target) {
  Range range = {-1.0, INFINITY, 0.0};
  double from = 0.0, to = depth;
  for (int pass = 0; pass < kPasses; ++pass) {
    double depths[kBounds + 2], bounds[kBounds], sums[kBounds];
    depths[0] = from, depths[kBounds + 1] = to;
    for (int j = 1; j <= kBounds; ++j) {
      depths[j] = pass == 0 ? std::ldexp(to, j - kBounds - 1) : from + (to - from) * j / (kBounds + 1);
      bounds[j - 1] = std::exp(-depths[j]);
    }
    weigh_above<kCount>(e, size, bounds, sums);
    int j = 0;
    for (; j < kBounds && sums[j] < target; ++j) range.high = bounds[j], range.before = sums[j];
    if (j < kBounds) range.low = bounds[j];
    from = depths[j], to = depths[j + 1];
  }
  return range;
}

// kCount: the cut after the `target` first; else after those whose e reach it. `entries`: memory for `size`.
template <bool kCount>
Cut find_cut(const float* z, const double* e, int64_t size, double depth, double target, Weighted* entries) {
  const Range range = narrow<kCount>(e, size, depth, target);
  int64_t count = 0, i = 0;
  const auto add = [&](int64_t id) { entries[count++] = {z[id], kCount ? 1.0 : e[id]}; };
  for (; i + kWide <= size; i += kWide)
    for (uint32_t lanes = lanes_within(e + i, range.low, range.high); lanes != 0; lanes &= lanes - 1) add(i + __builtin_ctz(lanes));
  for (; i < size; ++i)
    if (e[i] > range.low && e[i] <= range.high) add(i);
  return cut_within(entries, count, range.before, target);
}

// Sets e to 0 beyond the cut.
inline void apply_cut(const Cut& cut, const float* z, int64_t size, double* e) {
  for (int64_t i = 0; i < size; ++i) e[i] = z[i] >= cut.z ? e[i] : 0.0;
  if (cut.equal == cut.ties) return;
  int64_t ties = cut.ties;
  for_above(z, size, cut.z, [&](int64_t id) {
    if (z[id] == cut.z && e[id] > 0.0 && ties-- <= 0) e[id] = 0.0;
    return true;
  });
}

}  // namespace octavo
