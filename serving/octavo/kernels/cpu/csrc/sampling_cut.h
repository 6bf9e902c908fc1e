// Finds where a descending order would be cut, without sorting: the shortest prefix in (z descending, position
// ascending) whose weight reaches a target. A histogram over z finds the bucket of the cut; within it a three-way
// quickselect does.
#pragma once

#include <algorithm>

#include "common.h"

namespace octavo {

// Kept: every z above `z`, and of those equal to it the first `ties`.
struct Cut {
  float z;
  int64_t ties;
};

constexpr int kBuckets = 4096;
constexpr float kBucketsPerUnit = 32.0f;

struct Weighted {
  float z;
  double weight;
};

// Memory for one search over at most `count` entries.
struct CutSpace {
  double* sums;       // [kBuckets]
  Weighted* entries;  // [count]
};

OCTAVO_INLINE int bucket_of(float z, float top) {
  return static_cast<int>(std::min((top - z) * kBucketsPerUnit, kBuckets - 1.0f));
}

// The cut among entries of one bucket, `before` being the weight of everything above it.
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
      return {pivot, ties};
    }
    Weighted* stop = std::partition(entries, entries + count,
                                    [&](const Weighted& entry) { return higher ? entry.z > pivot : entry.z < pivot; });
    if (stop == entries) return {pivot, num_equal};  // only by rounding of the sums
    if (!higher) before += above + equal;
    count = stop - entries;
  }
}

// weights null: each counts 1. Entries of -inf weigh nothing that matters; top is the largest z, finite.
inline Cut find_cut(const float* z, const double* weights, int64_t count, float top, double target,
                    const CutSpace& space) {
  std::fill_n(space.sums, kBuckets, 0.0);
  for (int64_t i = 0; i < count; ++i) space.sums[bucket_of(z[i], top)] += weights == nullptr ? 1.0 : weights[i];
  double before = 0.0;
  int bucket = 0, last = 0;
  for (; bucket < kBuckets && before + space.sums[bucket] < target; ++bucket) {
    if (space.sums[bucket] > 0.0) last = bucket;
    before += space.sums[bucket];
  }
  if (bucket == kBuckets) {  // only by rounding of the sums: the cut is in the last bucket that holds anything
    bucket = last;
    before -= space.sums[last];
  }
  int64_t inside = 0;
  for (int64_t i = 0; i < count; ++i)
    if (bucket_of(z[i], top) == bucket) space.entries[inside++] = {z[i], weights == nullptr ? 1.0 : weights[i]};
  return cut_within(space.entries, inside, before, target);
}

}  // namespace octavo
