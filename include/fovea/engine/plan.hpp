// SPDX-License-Identifier: Apache-2.0
// The plan of a step: sequences, tiles, tasks. A pure function of lengths, options and the machine; holds no data pointer,
// so one plan serves every layer of a step. The key tile and the key split are functions of (dims, instruction set, regime)
// alone: that is what keeps a row's bits independent of the batch, the threads and the cache sizes.
#pragma once
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "../core/cpu_shape.hpp"
#include "../core/shapes.hpp"
#include "../core/status.hpp"
#include "../core/workspace.hpp"
#include "../simd/tiles.hpp"

namespace fovea {
inline namespace v0 {
inline namespace FOVEA_ARCH {

// One sequence of the batch. `pos` is the position of its query 0.
struct Sequence {
  index_t q_begin, len_q, k_begin, len_k, pos;
  index_t batch, kv_batch;   // entries of q and out, of k and v
  bool operator==(const Sequence&) const = default;
};

// A query at pos can see the keys pos - left .. pos + right at most.
struct Reach {
  index_t left, right;
};
inline constexpr index_t kUnbounded = index_t{1} << 40;

// Rows of one (sequence, kv head): row r is query r / group of q head kv_head * group + r % group, so that the heads of a
// GQA group stand next to each other and share what their position sees.
struct Block {
  std::int32_t sequence, kv_head;
  index_t row_begin, row_count;
  std::int32_t splits;
  Regime regime;
  index_t first_partial;   // where its (split, row) partials start, counted in rows
};

struct Task {
  std::int32_t block, split;
  index_t k_begin, k_end;
};

struct PlanRequest {
  index_t q_heads, kv_heads, dim_qk, dim_v;
  Reach reach;
  Regime regime;
  Panels panels;
  int lanes;
  CpuShape cpu;
  bool split_keys = true;   // may decode regimes split the keys of a row into partial results
  bool strip = false;       // keep whole rows of scores
};

inline constexpr index_t kDecodeRows = 16;   // at most so many query rows per kv head read K and V in place
inline constexpr index_t kWideRows = 256;    // at most so many are packed and still split the keys: one kv head of many
// Products of bf16 make packing pay earlier. 8192 keys of dim 128 in bf16, read in place and packed, in ms: AMX 8.8 and 12.2 with 4
// rows, 13.4 and 12.9 with 8, 17.8 and 13.6 with 12; the dot product on Zen 4 (four kv heads) 1.78 and 1.42 with 8, 3.30 and 2.11
// with 16. Compiled for AMX but without it, the dot product is slow.
inline constexpr index_t kBf16DecodeRows = 8;
inline index_t decode_rows(Panels panels) {
  return panels == Panels::bf16 && tile_products_allowed() ? kBf16DecodeRows : kDecodeRows;
}
inline Regime automatic_regime(index_t rows, Panels panels) {
  return rows <= decode_rows(panels) ? Regime::decode : rows <= kWideRows ? Regime::wide_decode : Regime::prefill;
}
inline constexpr index_t kSplitKeys = 1024;                // decode and wide decode: keys of one partial result
inline constexpr index_t kStripBytes = index_t{2} << 20;   // whole rows of scores of one block: what an L2 holds
inline constexpr index_t kMaxTasks = index_t{1} << 24;

// K and V tiles of 128 KiB each at dim 128 stay in a 1 MiB L2 beside Q and the accumulators; larger dims take fewer keys.
constexpr index_t key_tile(index_t dim_qk, index_t dim_v) {
  const index_t wide = std::max(dim_qk, dim_v);
  return wide <= 160 ? 256 : wide <= 320 ? 128 : 64;
}
static_assert(key_tile(1, 1) <= kMaxKeyTile && key_tile(576, 576) % kPanel == 0 && kSplitKeys % kMaxKeyTile == 0 &&
              key_tile(576, 576) % kScoreRun == 0);

constexpr index_t padded(index_t count, index_t multiple) { return (count + multiple - 1) / multiple * multiple; }

class Plan {
 public:
  // `sequences` is filled by the caller before; everything else is derived.
  Status build(const PlanRequest& request);
  // The same where lists say which keys rows have (KeyRanges): a block then never holds rows of two lists, and its keys are
  // counted in slots of its list. request.kv_heads are the heads that have lists or keys of their own.
  template <class Lists>
  Status build(const PlanRequest& request, const Lists& lists);
  // Prefill where neighbouring rows, `rows` of them, have a list each, and a mask with runs (RunMask) says what is in it: blocks hold
  // whole lists, as many as pay for packing K and V, and keys are positions.
  Status build_together(const PlanRequest& request, index_t rows);

  index_t group() const { return request.q_heads / request.kv_heads; }
  index_t group_rows(Regime regime) const { return regime == Regime::decode ? kDecodeRows : packed_rows(request.panels); }
  // Positions of a row, its keys before any mask: hull of the reach, clipped to the sequence.
  index_t first_key(const Sequence& sequence, index_t pos) const {
    return std::clamp<index_t>(pos - request.reach.left, 0, sequence.len_k);
  }
  index_t end_key(const Sequence& sequence, index_t pos) const {
    return std::clamp<index_t>(pos + request.reach.right + 1, 0, sequence.len_k);
  }

  std::size_t workspace_bytes(int lanes) const;
  std::string describe() const;

  PlanRequest request{};
  index_t key_tile_size = 0;
  index_t max_rows = 0;       // of any block, rounded up to whole row groups
  index_t partial_rows = 0;   // (split, row) pairs
  index_t strip_keys = 0;     // keys of a row of scores that is kept whole, in whole key tiles; 0 without
  bool has_packed = false;
  bool listed = false;               // keys are slots of lists
  index_t list_rows = PTRDIFF_MAX;   // rows that share a list, where a block holds several
  std::vector<Sequence> sequences;
  std::vector<Block> blocks;
  std::vector<Task> tasks;

 private:
  struct Keys {
    index_t begin, end;
  };
  // apart: rows that may share a block. keys(sequence, kv_head, first row, end row).
  template <class KeysOf>
  Status build_tasks(index_t apart, const KeysOf& keys_of);
  Keys reached_keys(const Sequence& sequence, index_t begin, index_t end) const {
    const index_t k_begin = first_key(sequence, sequence.pos + begin / group());
    return {k_begin, std::max(end_key(sequence, sequence.pos + (end - 1) / group()), k_begin)};
  }
  // Rows of a block that holds whole lists: cap rows at most, in groups, and about a count-th of all.
  index_t lists_together(index_t rows, index_t cap, index_t count) const {
    const index_t most = std::max<index_t>(cap / padded(list_rows, group_rows(Regime::prefill)), 1);
    return std::min(most, (rows + count * list_rows - 1) / (count * list_rows)) * list_rows;
  }
  // Rows of a block in groups, none of which holds rows of two lists.
  index_t grouped_rows(index_t rows, Regime regime) const {
    const index_t list = std::min(list_rows, rows), lists = rows / list, group = group_rows(regime);
    return lists * padded(list, group) + padded(rows - lists * list, group);
  }
};

// One lane's slice of the workspace. Filled by the same code that counts its bytes.
struct LaneMemory {
  Row* rows;                 // [max_rows]
  float* staging;            // [row of a group, padded dim_qk]  queries that are not stored as f32
  float* queries;            // packed [row group], decode [row, padded dim_qk]
  float* keys;               // [panel], as the panel type packs them (simd/panels.hpp)
  float* values;             // [panel]
  float* scores;             // [row of a group, kScoreStride]
  float* rescale;            // [row of a group]
  float* acc;                // [max_rows, padded dim_v]
  std::byte* states;         // [max_rows, kStateBytes]
  std::uint8_t* live;        // [row of a group, kMaxKeyTile]
  index_t* hulls;            // [row group, 2]
  float* strip;              // [max_rows + 1, strip_keys]  the last row is scratch
  std::int32_t* positions;   // [kMaxKeyTile + kPositionsAhead]  of the key tile's slots, where keys are listed
  std::byte* gathered;       // [kGatherRows, gathered_row(dim_qk)], [kGatherRows, gathered_row(dim_v)]
};

inline constexpr index_t kPositionsAhead = 64;   // slots behind a key tile that its last rows may prefetch
inline constexpr index_t kGatherRows = 16;       // scattered rows that are copied together: one transposition of keys
// Bytes of a stored row of any format: numbers of up to 8 bytes, or codes in whole groups with scales and other numbers behind.
constexpr index_t gathered_row(index_t dim) { return padded(8 * dim + 128, 64); }

inline constexpr index_t kStateBytes = 32;   // of a row's normaliser; the workspace's size is known before the policies are
inline constexpr index_t kGroupRows = std::max({kTileRows, kDecodeRows, kHasTiles ? kTileStep : 0});

inline index_t acc_stride(const Plan& plan) { return padded(plan.request.dim_v, kLanes); }
inline index_t query_stride(const Plan& plan) { return padded(plan.request.dim_qk, kLanes); }

inline LaneMemory carve_lane(Bump& bump, const Plan& plan) {
  const PlanRequest& r = plan.request;
  const index_t rows = plan.max_rows, tile = plan.has_packed ? plan.key_tile_size : 0;
  LaneMemory memory{};
  memory.rows = bump.take<Row>(rows);
  memory.staging = bump.take<float>(kGroupRows * query_stride(plan));
  memory.queries = bump.take<float>(rows * query_stride(plan));
  memory.keys = bump.take<float>(tile * query_stride(plan));
  memory.values = bump.take<float>(tile * padded(r.dim_v, kPanel));
  memory.scores = bump.take<float>(kGroupRows * kScoreStride);
  memory.rescale = bump.take<float>(kGroupRows);
  memory.acc = bump.take<float>(rows * acc_stride(plan));
  memory.states = bump.take<std::byte>(rows * kStateBytes);
  memory.live = bump.take<std::uint8_t>(kGroupRows * kMaxKeyTile);
  memory.hulls = bump.take<index_t>(2 * (rows / std::min(kTileRows, kDecodeRows) + 1));
  memory.strip = bump.take<float>(plan.strip_keys == 0 ? 0 : (rows + 1) * plan.strip_keys);
  memory.positions = bump.take<std::int32_t>(plan.listed ? kMaxKeyTile + kPositionsAhead : 0);
  memory.gathered = bump.take<std::byte>(plan.listed ? kGatherRows * (gathered_row(r.dim_qk) + gathered_row(r.dim_v)) : 0);
  return memory;
}

// What the lanes share: the partial rows of split blocks and, per block, how many of its tasks are still open.
struct SharedMemory {
  float* acc;           // [partial row, padded dim_v]
  std::byte* states;    // [partial row, kStateBytes]
  std::int32_t* open;   // [block]
};

inline SharedMemory carve_shared(Bump& bump, const Plan& plan) {
  SharedMemory memory{};
  if (plan.partial_rows == 0) return memory;
  memory.acc = bump.take<float>(plan.partial_rows * acc_stride(plan));
  memory.states = bump.take<std::byte>(plan.partial_rows * kStateBytes);
  memory.open = bump.take<std::int32_t>(static_cast<index_t>(plan.blocks.size()));
  return memory;
}

inline std::size_t Plan::workspace_bytes(int lanes) const {
  Bump one, shared;
  carve_lane(one, *this);
  carve_shared(shared, *this);
  return one.used() * static_cast<std::size_t>(std::max(lanes, 1)) + shared.used() + kAlignment;
}

inline Status Plan::build(const PlanRequest& wanted) {
  request = wanted;
  listed = false;
  list_rows = PTRDIFF_MAX;
  return build_tasks(PTRDIFF_MAX, [this](const Sequence& sequence, index_t, index_t begin, index_t end) {
    return reached_keys(sequence, begin, end);
  });
}

inline Status Plan::build_together(const PlanRequest& wanted, index_t rows) {
  request = wanted;
  listed = false;
  list_rows = rows;
  return build_tasks(PTRDIFF_MAX, [this](const Sequence& sequence, index_t, index_t begin, index_t end) {
    return reached_keys(sequence, begin, end);
  });
}

template <class Lists>
Status Plan::build(const PlanRequest& wanted, const Lists& lists) {
  request = wanted;
  listed = true;
  list_rows = PTRDIFF_MAX;
  return build_tasks(lists.q_block() * group(), [&](const Sequence& sequence, index_t kv_head, index_t begin, index_t) {
    const auto s = static_cast<index_t>(&sequence - sequences.data());
    return Keys{0, lists.slots(lists.list_of(s, kv_head, begin / group()))};
  });
}

template <class KeysOf>
Status Plan::build_tasks(index_t apart, const KeysOf& keys_of) {
  key_tile_size = key_tile(request.dim_qk, request.dim_v);
  max_rows = partial_rows = strip_keys = 0;
  has_packed = false;
  blocks.clear();
  tasks.clear();

  // More rows mean fewer packings of the same K and V. Q and the accumulators of a block are read once per key tile, in order,
  // so they may be larger than the L2 that the K and V panels must stay in: dim 128 runs 1 % faster with 1024 rows than with
  // 512, 3 % faster than with 264. At least four blocks a lane, where the rows allow it.
  const index_t row_bytes = 4 * (query_stride(*this) + acc_stride(*this));
  const index_t tile_rows = group_rows(Regime::prefill);
  const index_t row_cap = std::clamp(request.cpu.l2_bytes / row_bytes, tile_rows, index_t{1024}) / tile_rows * tile_rows;
  const index_t heads = std::max<index_t>(static_cast<index_t>(sequences.size()) * request.kv_heads, 1);
  const index_t blocks_wanted = request.lanes > 1 ? (4 * request.lanes + heads - 1) / heads : 1;

  // visit(block, keys, first split) for every block of a sequence; rows are cut at the ends of lists first.
  const auto for_each_block = [&](const auto& visit) {
    for (std::size_t s = 0; s < sequences.size(); ++s) {
      const Sequence& sequence = sequences[s];
      const index_t all_rows = sequence.len_q * group();
      if (all_rows == 0) continue;
      const index_t list = std::min(apart, all_rows), lists = (all_rows + list - 1) / list;
      const Regime regime = list_rows != PTRDIFF_MAX              ? Regime::prefill
                            : request.regime == Regime::automatic ? automatic_regime(list, request.panels)
                                                                  : request.regime;
      const bool splits_keys = regime != Regime::prefill && request.split_keys && !request.strip;
      for (index_t list_begin = 0; list_begin < all_rows; list_begin += list) {
        const index_t rows = std::min(list, all_rows - list_begin);
        index_t cap = regime == Regime::decode ? kDecodeRows : row_cap;
        if (request.strip) {
          // What a block of up to 1024 rows reaches, in whole key tiles.
          const index_t reached = request.reach.left + request.reach.right + 2 * key_tile_size + 1024 / group();
          const index_t kept = kStripBytes / (4 * std::max(std::min(sequence.len_k, reached), key_tile_size));
          cap = std::clamp(kept / tile_rows * tile_rows, std::min(tile_rows, cap), cap);
        }
        const index_t wanted = (blocks_wanted + lists - 1) / lists;
        const index_t count = std::max((rows + cap - 1) / cap, std::min(wanted, (rows + tile_rows - 1) / tile_rows));
        const index_t step = list_rows == PTRDIFF_MAX ? padded((rows + count - 1) / count, group_rows(regime))
                                                      : lists_together(rows, cap, count);
        for (index_t begin = list_begin; begin < list_begin + rows; begin += step) {
          const index_t row_count = std::min(step, list_begin + rows - begin);
          for (index_t kv_head = 0; kv_head < request.kv_heads; ++kv_head) {
            const Keys keys = keys_of(sequence, kv_head, begin, begin + row_count);
            // Splits start at absolute multiples, so a key belongs to the same split whoever asks.
            const index_t first_split = splits_keys ? keys.begin / kSplitKeys : 0;
            const index_t splits =
                splits_keys ? std::max<index_t>((keys.end + kSplitKeys - 1) / kSplitKeys - first_split, 1) : 1;
            const Block block{static_cast<std::int32_t>(s),
                              static_cast<std::int32_t>(kv_head),
                              begin,
                              row_count,
                              static_cast<std::int32_t>(splits),
                              regime,
                              0};
            if (!visit(block, keys, first_split)) return;
          }
        }
      }
    }
  };

  // One walk counts the tasks, so that nothing is allocated for a plan that is refused; a second one writes them down.
  index_t task_count = 0;
  for_each_block([&](const Block& block, Keys, index_t) {
    task_count += block.splits;
    return task_count <= kMaxTasks;
  });
  if (task_count > kMaxTasks) {
    sequences.clear();
    return Status::error(Code::unsupported, "fovea: more than %td tasks in one call; split the batch", kMaxTasks);
  }
  tasks.reserve(static_cast<std::size_t>(task_count));
  for_each_block([&](Block block, Keys keys, index_t first_split) {
    const auto index = static_cast<std::int32_t>(blocks.size());
    block.first_partial = partial_rows;
    blocks.push_back(block);
    for (index_t split = 0; split < block.splits; ++split) {
      const index_t from = block.splits == 1 ? keys.begin : std::max(keys.begin, (first_split + split) * kSplitKeys);
      const index_t to = block.splits == 1 ? keys.end : std::min(keys.end, (first_split + split + 1) * kSplitKeys);
      tasks.push_back({index, static_cast<std::int32_t>(split), from, to});
    }
    if (block.splits > 1) partial_rows += block.splits * block.row_count;
    if (request.strip)
      strip_keys = std::max(strip_keys, padded(keys.end, key_tile_size) - keys.begin / key_tile_size * key_tile_size);
    has_packed = has_packed || block.regime != Regime::decode;
    max_rows = std::max(max_rows, grouped_rows(block.row_count, block.regime));
    return true;
  });

  // Longest first, so that no lane ends on a long task alone. The order moves no bit of a result.
  const auto cost = [this](const Task& task) {
    return (task.k_end - task.k_begin) * blocks[static_cast<std::size_t>(task.block)].row_count;
  };
  const auto longer = [&](const Task& a, const Task& b) {
    const index_t cost_a = cost(a), cost_b = cost(b);
    return cost_a != cost_b ? cost_a > cost_b : a.block != b.block ? a.block < b.block : a.split < b.split;
  };
  if (request.lanes > 1 && !std::is_sorted(tasks.begin(), tasks.end(), longer))
    std::sort(tasks.begin(), tasks.end(), longer);
  return {};
}

inline std::string Plan::describe() const {
  index_t split_blocks = 0, decode_blocks = 0, wide_blocks = 0, most_splits = 1;
  for (const Block& block : blocks) {
    split_blocks += block.splits > 1;
    decode_blocks += block.regime == Regime::decode;
    wide_blocks += block.regime == Regime::wide_decode;
    most_splits = std::max<index_t>(most_splits, block.splits);
  }
  const auto all = static_cast<index_t>(blocks.size());
  const char* const regime = decode_blocks == all               ? "decode (K and V read in place)"
                             : wide_blocks == all               ? "wide decode (K and V packed per key tile, keys split)"
                             : decode_blocks + wide_blocks == 0 ? "prefill (K and V packed per key tile)"
                                                                : "mixed, by the rows of each sequence";
  const bool packs = decode_blocks < all || all == 0;
  const char* const panels = !packs                         ? "no"
                             : request.panels == Panels::f32 ? "f32"
                             : tiles_allowed()               ? "bf16 (AMX)"
                                                             : "bf16";
  char text[640];
  std::snprintf(text, sizeof text,
                "regime      %s\n"
                "heads       %td query, %td kv (group %td), dims %td/%td\n"
                "tiles       %td rows x %td keys, %s panels\n"
                "tasks       %zu tasks in %zu blocks of up to %td rows, %zu sequences\n"
                "key splits  %td blocks split, at most %td splits of %td keys\n"
                "isa         " FOVEA_ARCH_NAME
                "\n"
                "workspace   %zu bytes for %d lanes\n",
                regime, request.q_heads, request.kv_heads, group(), request.dim_qk, request.dim_v,
                group_rows(packs ? Regime::prefill : Regime::decode), key_tile_size, panels, tasks.size(), blocks.size(),
                max_rows, sequences.size(), split_blocks, most_splits, kSplitKeys, workspace_bytes(request.lanes), request.lanes);
  return text;
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
