// Packs int8 weights [N, K] into panels and sums their columns, once at load.
#include <sys/mman.h>

#include <algorithm>

#include "gemm.h"

namespace octavo {
namespace {

struct Source {
  const int8_t* weight;  // [N, K]
  int64_t outputs, inputs;
};

void pack_panel(const Source& source, int64_t panel, int8_t* packed) {
  const int64_t quads = quads_of(source.inputs);
  const int64_t whole = source.inputs / kQuad;
  std::memset(packed, 0, quads * kPanel * kQuad);
  const int64_t lanes = std::min<int64_t>(kPanel, source.outputs - panel * kPanel);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int8_t* row = source.weight + (panel * kPanel + lane) * source.inputs;
    for (int64_t quad = 0; quad < whole; ++quad) std::memcpy(packed + packed_offset(lane, quad, quads), row + quad * kQuad, kQuad);
    if (whole < quads) std::memcpy(packed + packed_offset(lane, whole, quads), row + whole * kQuad, source.inputs - whole * kQuad);
  }
}

// sums[g · num_outputs_padded + n] for the outputs of one panel
void sum_panel(const Source& source, int64_t panel, int64_t num_groups, int32_t* sums) {
  const int64_t padded = panels_of(source.outputs) * kPanel;
  const int64_t group_size = source.inputs / num_groups;
  for (int64_t n = panel * kPanel; n < (panel + 1) * kPanel; ++n)
    for (int64_t group = 0; group < num_groups; ++group) {
      int32_t sum = 0;
      const int8_t* part = source.weight + n * source.inputs + group * group_size;
      if (n < source.outputs)
        for (int64_t k = 0; k < group_size; ++k) sum += part[k];
      sums[group * padded + n] = sum;
    }
}

}  // namespace
}  // namespace octavo

// weight [N, K] -> packed panels and column sums [num_groups][panels · 16].
OCTAVO_API void octavo_pack_int8(octavo::Pool* pool, const int8_t* weight, int64_t outputs, int64_t inputs, int64_t num_groups,
                                 int8_t* packed, int32_t* sums) {
  using namespace octavo;
  const Source source{weight, outputs, inputs};
  const int64_t panel_bytes = quads_of(inputs) * kPanel * kQuad;
  parallel_for(pool, panels_of(outputs), [&](int64_t panel, int) {
    pack_panel(source, panel, packed + panel * panel_bytes);
    sum_panel(source, panel, num_groups, sums);
  });
}

// Asks for huge pages; where there are none nothing changes.
OCTAVO_API void octavo_advise_huge_pages(void* data, int64_t bytes) {
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
}
