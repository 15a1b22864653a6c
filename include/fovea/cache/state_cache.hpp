// SPDX-License-Identifier: Apache-2.0
// StateCache: the recurrent states of many sequences and layers, and the inputs of the short convolution in front of them.
// A state cannot be cut like a KV cache: to take tokens back, either a state is kept for each of the last tokens, or a
// checkpoint and what the last tokens would change (replay, cache/replay.hpp). One writer at a time; no call throws, and a
// refused one changes nothing.
#pragma once
#include "../core/recurrent.hpp"
#include "../simd/numbers.hpp"
#include "rows.hpp"

namespace fovea {
inline namespace v0 {

struct StateCacheShape {
  index_t layers = 1;
  index_t sequences = 1;                     // open at the same time
  index_t snapshots = 0;                     // kept at the same time
  index_t heads = 1, dim_k = 0, dim_v = 0;   // of the states: state_heads of core/recurrent.hpp
  StateLayout layout = StateLayout::k_first;
  index_t extra = 0;   // numbers per head beside the state: a key sum, or mLSTM's n and m; not with replay
  index_t conv_channels = 0, conv_width = 4;   // no channels = no short convolution
  index_t max_draft = 0;        // tokens that rollback() can take back, counted from where the sequence was longest
  index_t replay = 0;           // 0: max_draft + 1 states per sequence. Otherwise one state, a checkpoint that takes in the
                                // tokens behind it `replay` at a time, and the newest replay + max_draft tokens
  bool channel_decay = false;   // of a replayed token: dim_k factors (KDA, GLA), not one
  bool poison = false;          // 0xFF wherever nothing is; writes all memory once at creation
};

// What a call over the next tokens of some adjacent sequences reads and writes in one layer. Null where there is none.
struct StateViews {
  View<const float, 4> initial_state = {};   // [sequence, head, dim_k, dim_v] or as the layout says
  View<float, 4> final_state = {};
  View<const float, 3> initial_extra = {};   // [sequence, head, extra]; parts of the last axis do not interleave in memory
  View<float, 3> final_extra = {};
  View<const float, 3> conv_initial = {};   // [sequence, channel, width - 1]
  View<float, 3> conv_final = {};           // the same memory if max_draft is 0; otherwise null: keep_inputs() does it
};

inline namespace FOVEA_ARCH {

// The replayed tokens of one head; token t is in place t mod capacity. Rows are padded to whole vectors; the padding of a
// key that was written is 0.
struct ReplayTokens {
  float* keys = nullptr;     // [capacity, key_stride]
  float* decays = nullptr;   // [capacity, decay_stride]  factors, 0 to 1
  float* values = nullptr;   // [capacity, value_stride]  what is added to the state's row x, divided by k_x
  index_t key_stride = 0, decay_stride = 0, value_stride = 0, capacity = 0;

  index_t place(index_t token) const { return token % capacity; }
  float* key(index_t token) const { return keys + place(token) * key_stride; }
  float* decay(index_t token) const { return decays + place(token) * decay_stride; }
  float* value(index_t token) const { return values + place(token) * value_stride; }
};

// Input t of the convolution stands in row t mod ring; the first width - 2 rows stand behind the last one once more, so that
// any width - 1 inputs in a row are adjacent. Inputs before the first token have negative numbers and are 0.
struct InputPlaces {
  index_t history = 0, ring = 0, rows = 0;   // history = width - 1

  InputPlaces() = default;
  InputPlaces(index_t width, index_t max_draft)
      : history(width - 1), ring(width - 1 + max_draft), rows(max_draft == 0 ? ring : ring + width - 2) {}

  index_t row(index_t input) const { return (input + ring) % ring; }
  // Where the history of position `pos` starts. Without drafts it is updated in place and does not turn.
  index_t window(index_t pos) const { return rows == history ? 0 : row(pos - history); }
  index_t oldest(index_t written) const { return written - ring; }
};

class StateCache {
 public:
  // Replaces whatever the cache held; on error it keeps it.
  Status create(const StateCacheShape& shape) {
    if (Status status = check_shape(shape); !status.ok()) return status;
    const auto take = [&](Bump& bump, State& state) { lay_out(bump, state, shape); };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    State& s = owned_.state;
    for (index_t n = 0; n < shape.sequences; ++n) {
      s.sequence[n] = {};
      s.free_sequences[n] = shape.sequences - 1 - n;
      for (index_t slot = 0; slot < s.slots; ++slot) s.tag[n * s.slots + slot] = kNothing;
    }
    for (index_t n = 0; n < shape.snapshots; ++n) {
      s.snapshot[n] = {};
      s.free_snapshots[n] = shape.snapshots - 1 - n;
    }
    s.free_sequence_count = shape.sequences;
    s.free_snapshot_count = shape.snapshots;
    if (shape.poison)
      std::memset(static_cast<void*>(s.numbers), 0xff, static_cast<std::size_t>(s.number_count) * sizeof(float));
    return {};
  }

  // A new sequence without tokens; its states are zero.
  Status open(index_t* sequence) {
    State& s = owned_.state;
    if (s.free_sequence_count == 0) {
      return Status::error(Code::out_of_pages, "cache: all %td sequences are open", s.shape.sequences);
    }
    const index_t n = s.free_sequences[--s.free_sequence_count];
    s.sequence[n] = {.open = true, .oldest_input = -s.inputs.history};
    forget_slots(n, 0);
    for (index_t layer = 0; layer < s.shape.layers; ++layer) {
      each_run_of_slot(layer, n, 0, zero);
      zero(inputs(layer, n), s.inputs.rows * s.shape.conv_channels);
    }
    set_layers(n, 0, 0);
    *sequence = n;
    return {};
  }

  Status close(index_t sequence) {
    if (Status status = check_open(sequence); !status.ok()) return status;
    State& s = owned_.state;
    s.sequence[sequence] = {};
    for (index_t at = 0; at < s.slots; ++at) s.tag[sequence * s.slots + at] = kNothing;
    each_run_of(sequence, [&](float* from, index_t count) { poison(from, count); });
    s.free_sequences[s.free_sequence_count++] = sequence;
    return {};
  }

  // Announces one call over `tokens` tokens in every layer, which writes one state: prefill, or a step. With replay the
  // buffer must have been folded. Then views() for each layer, and commit().
  Status begin_call(index_t sequence, index_t tokens) {
    if (Status status = check_begin(sequence, tokens, kLargestCache); !status.ok()) return status;
    State& s = owned_.state;
    Sequence& mine = s.sequence[sequence];
    if (replays()) {
      for (index_t layer = 0; layer < s.shape.layers; ++layer) {
        if (folded(layer, sequence) == mine.len) continue;
        return Status::error(
            Code::invalid_argument,
            "cache: layer %td of sequence %td has a checkpoint of %td tokens and %td behind it; fold it first", layer,
            sequence, folded(layer, sequence), mine.len - folded(layer, sequence));
      }
      mine.checkpoint = mine.len + tokens;
      set_layers(sequence, mine.checkpoint, mine.checkpoint);
    } else {
      claim(sequence, 1, mine.len + tokens);
    }
    start(mine, sequence, tokens, false);
    return {};
  }

  // Announces `tokens` tokens whose effects are kept one by one, so that commit() may accept any number of them: drafts, or
  // a decode step. At most max_draft of them (at least 1), with replay at most `replay`; where there is a convolution, more than
  // max_draft of those cannot be refused again, as its inputs are kept no longer.
  Status begin_steps(index_t sequence, index_t tokens) {
    const State& known = owned_.state;
    const index_t most = replays() ? known.shape.replay : std::max(known.shape.max_draft, index_t{1});
    if (Status status = check_begin(sequence, tokens, most); !status.ok()) return status;
    State& s = owned_.state;
    Sequence& mine = s.sequence[sequence];
    if (replays()) {
      if (mine.len - mine.checkpoint + tokens > s.capacity) mine.checkpoint = mine.len - s.shape.max_draft;
      for (index_t layer = 0; layer < s.shape.layers; ++layer) s.done[place(layer, sequence)] = mine.len;
    } else {
      claim(sequence, tokens, mine.len + 1);
    }
    start(mine, sequence, tokens, true);
    return {};
  }

  // What layer `layer` reads and writes at token `step` of begin_steps (0 after begin_call), for `count` adjacent sequences:
  // all of them must have begun, and their cursors must agree, which those of sequences always stepped together do, and
  // all if max_draft is 0. With replay and begin_steps there is a convolution only.
  Status views(index_t layer, index_t first, StateViews* to, index_t step = 0, index_t count = 1) {
    if (Status status = first_error({check_layer(layer), check_run(first, count)}); !status.ok()) return status;
    const State& s = owned_.state;
    const Sequence& one = s.sequence[first];
    for (index_t n = first; n < first + count; ++n) {
      const Sequence& mine = s.sequence[n];
      if (mine.begun == 0 || step < 0 || step >= (mine.steps ? mine.begun : 1)) {
        return Status::error(Code::invalid_argument, "cache: step %td of sequence %td, which has begun %td", step, n,
                             mine.steps ? mine.begun : std::min(mine.begun, index_t{1}));
      }
      if (mine.slot != one.slot || mine.steps != one.steps ||
          (s.shape.conv_channels > 0 && s.inputs.window(mine.len + step) != s.inputs.window(one.len + step))) {
        return Status::error(Code::unsupported,
                             "cache: the cursors of sequences %td and %td differ (%td and %td tokens); one call each", first,
                             n, one.len, mine.len);
      }
    }
    *to = {};
    if (!replays() || !one.steps) {
      const index_t before = turned(one.slot, step), after = turned(one.slot, step + 1);
      to->initial_state = as_const(state_view(layer, first, before, count));
      to->final_state = state_view(layer, first, after, count);
      if (s.shape.extra > 0) {
        to->initial_extra = as_const(extra_view(layer, first, before, count));
        to->final_extra = extra_view(layer, first, after, count);
      }
    }
    if (s.shape.conv_channels > 0) {
      const index_t channels = s.shape.conv_channels;
      float* const window = inputs(layer, first) + s.inputs.window(one.len + step) * channels;
      const View<float, 3> in_place{window, {count, channels, s.inputs.history}, {s.inputs.rows * channels, 1, channels}};
      to->conv_initial = {window, in_place.extent, in_place.stride};
      if (s.shape.max_draft == 0) to->conv_final = in_place;
    }
    return {};
  }

  // The convolution's inputs x [1, 1, pos, channel], after the convolution has read its history; only with max_draft > 0.
  // After begin_steps those of the next tokens, in any parts. After begin_call all of them or the newest, in one part: the
  // last conv_width - 1 + max_draft suffice, which is what a layer can hand out (ConvState::final of so many inputs).
  Status keep_inputs(index_t layer, index_t sequence, const Operand& x) {
    if (Status status = first_error({check_layer(layer), check_open(sequence)}); !status.ok()) return status;
    const State& s = owned_.state;
    const Sequence& mine = s.sequence[sequence];
    const index_t channels = s.shape.conv_channels, count = x.extent[2];
    if (s.shape.max_draft == 0 || channels == 0) {
      return Status::error(Code::unsupported, "cache: %td channels and a max_draft of %td: no inputs to keep", channels,
                           s.shape.max_draft);
    }
    if (!is_plain(x.format) || x.data == nullptr) {
      return Status::error(Code::invalid_argument, "cache: inputs are numbers in f32, f64, bf16 or f16 at a place not null");
    }
    index_t& kept = s.kept[place(layer, sequence)];
    const index_t most = std::max(index_t{0}, mine.len + mine.begun - kept);
    const index_t least = mine.steps ? 0 : std::min(most, s.inputs.ring);
    if (x.extent[0] != 1 || x.extent[1] != 1 || x.extent[3] != channels || count < least || count > most) {
      return Status::error(Code::invalid_argument,
                           "cache: inputs are [%td, %td, %td, %td], must be [1, 1, %td to %td, %td]", x.extent[0],
                           x.extent[1], count, x.extent[3], least, most, channels);
    }
    if (!mine.steps) kept += most - count;
    const index_t number = row_bytes(x.format, 1);
    for (index_t t = std::max(index_t{0}, count - s.inputs.ring); t < count; ++t) {
      float* const row = inputs(layer, sequence) + s.inputs.row(kept + t) * channels;
      read_numbers(x.format, x.data + t * x.stride[2] * number, x.stride[3], channels, row);
      mirror(layer, sequence, kept + t);
    }
    kept += count;
    return {};
  }

  // Ends what was begun: the first `tokens` of its tokens are now part of the sequence, the others were never there.
  Status commit(index_t sequence, index_t tokens) {
    if (Status status = check_open(sequence); !status.ok()) return status;
    State& s = owned_.state;
    Sequence& mine = s.sequence[sequence];
    if (mine.begun == 0 || tokens < 0 || tokens > mine.begun) {
      return Status::error(Code::invalid_argument, "cache: %td tokens to commit, sequence %td has begun %td", tokens,
                           sequence, mine.begun);
    }
    const index_t pos = mine.len + tokens;
    if (Status status = check_position(sequence, pos); !status.ok()) return status;
    for (index_t layer = 0; layer < s.shape.layers; ++layer) {
      const index_t stepped = replays() ? s.done[place(layer, sequence)] : pos;
      const index_t kept = s.shape.conv_channels > 0 && s.shape.max_draft > 0 ? s.kept[place(layer, sequence)] : pos;
      if (stepped >= pos && kept >= pos) continue;
      return Status::error(Code::invalid_argument,
                           "cache: %td tokens to commit, layer %td of sequence %td was given %td of them and %td inputs",
                           tokens, layer, sequence, stepped - mine.len, kept - mine.len);
    }
    stand_at(sequence, pos);
    return {};
  }

  // Takes the last `count` tokens back, as if they had never been.
  Status rollback(index_t sequence, index_t count) {
    if (Status status = check_idle(sequence); !status.ok()) return status;
    const Sequence& mine = owned_.state.sequence[sequence];
    if (count < 0 || count > mine.len) {
      return Status::error(Code::invalid_argument, "cache: %td tokens to roll back, sequence %td has %td", count, sequence,
                           mine.len);
    }
    if (Status status = check_position(sequence, mine.len - count); !status.ok()) return status;
    stand_at(sequence, mine.len - count);
    return {};
  }

  // A copy of a sequence as it stands, to be restored any number of times, into any sequence.
  Status take(index_t sequence, index_t* snapshot) {
    if (Status status = check_idle(sequence); !status.ok()) return status;
    State& s = owned_.state;
    if (s.free_snapshot_count == 0) {
      return Status::error(Code::out_of_pages, "cache: all %td snapshots are taken", s.shape.snapshots);
    }
    const index_t n = s.free_snapshots[--s.free_snapshot_count];
    const Sequence& mine = s.sequence[sequence];
    s.snapshot[n] = {true, mine.len, mine.checkpoint};
    const index_t channels = s.shape.conv_channels;
    for (index_t layer = 0; layer < s.shape.layers; ++layer) {
      float* to = saved_slot(layer, n);
      each_run_of_slot(layer, sequence, mine.slot, [&](const float* from, index_t count) {
        copy(from, to, count);
        to += count;
      });
      copy_tokens(layer, sequence, s.shape.sequences + n, mine.len);
      if (channels > 0)
        copy(inputs(layer, sequence) + s.inputs.window(mine.len) * channels, saved_inputs(layer, n),
             s.inputs.history * channels);
    }
    *snapshot = n;
    return {};
  }

  // The open sequence becomes what the snapshot is of, whatever it was and whatever was begun. Nothing older can be rolled
  // back to, except tokens that a replay buffer still holds, where there is no convolution.
  Status restore(index_t snapshot, index_t sequence) {
    if (Status status = first_error({check_taken(snapshot), check_open(sequence)}); !status.ok()) return status;
    State& s = owned_.state;
    const Snapshot& saved = s.snapshot[snapshot];
    s.sequence[sequence] = {
        .open = true, .len = saved.len, .checkpoint = saved.checkpoint, .oldest_input = saved.len - s.inputs.history};
    forget_slots(sequence, saved.len);
    const index_t channels = s.shape.conv_channels;
    for (index_t layer = 0; layer < s.shape.layers; ++layer) {
      const float* from = saved_slot(layer, snapshot);
      each_run_of_slot(layer, sequence, 0, [&](float* to, index_t count) {
        copy(from, to, count);
        from += count;
      });
      copy_tokens(layer, s.shape.sequences + snapshot, sequence, saved.len);
      for (index_t row = 0; channels > 0 && row < s.inputs.history; ++row) {
        const index_t input = saved.len - s.inputs.history + row;
        const index_t at = s.shape.max_draft == 0 ? row : s.inputs.row(input);
        copy(saved_inputs(layer, snapshot) + row * channels, inputs(layer, sequence) + at * channels, channels);
        mirror(layer, sequence, input);
      }
    }
    return {};
  }

  Status drop(index_t snapshot) {
    if (Status status = check_taken(snapshot); !status.ok()) return status;
    State& s = owned_.state;
    s.snapshot[snapshot] = {};
    each_run_of(s.shape.sequences + snapshot, [&](float* from, index_t count) { poison(from, count); });
    s.free_snapshots[s.free_snapshot_count++] = snapshot;
    return {};
  }

  const StateCacheShape& shape() const { return owned_.state.shape; }
  std::size_t bytes() const { return owned_.block.size(); }
  bool replays() const { return owned_.state.shape.replay > 0; }
  bool is_open(index_t sequence) const {
    return sequence >= 0 && sequence < shape().sequences && owned_.state.sequence[sequence].open;
  }
  bool is_taken(index_t snapshot) const {
    return snapshot >= 0 && snapshot < shape().snapshots && owned_.state.snapshot[snapshot].taken;
  }
  index_t len(index_t sequence) const {   // committed tokens
    FOVEA_ASSERT(is_open(sequence));
    return owned_.state.sequence[sequence].len;
  }
  index_t begun(index_t sequence) const {
    FOVEA_ASSERT(is_open(sequence));
    return owned_.state.sequence[sequence].begun;
  }
  // How many of the last tokens rollback() would take back, at most.
  index_t rollback_limit(index_t sequence) const {
    FOVEA_ASSERT(is_open(sequence));
    const State& s = owned_.state;
    const Sequence& mine = s.sequence[sequence];
    const index_t inputs_left = s.shape.conv_channels > 0 ? mine.len - s.inputs.history - mine.oldest_input : mine.len;
    index_t limit = replays() ? mine.len - mine.checkpoint : 0;
    for (index_t at = 0; !replays() && at < s.slots; ++at) {
      const index_t tag = s.tag[sequence * s.slots + at];
      if (tag != kNothing && tag <= mine.len && mine.len - tag <= inputs_left) limit = std::max(limit, mine.len - tag);
    }
    return std::max(index_t{0}, std::min({limit, inputs_left, mine.len}));
  }
  // The state of a sequence, to be read or filled: [1, head, dim_k, dim_v] or as the layout says. With replay that of the
  // checkpoint.
  View<float, 4> state(index_t layer, index_t sequence) const {
    FOVEA_ASSERT(is_open(sequence) && layer >= 0 && layer < shape().layers);
    return state_view(layer, sequence, owned_.state.sequence[sequence].slot, 1);
  }
  View<float, 3> extra(index_t layer, index_t sequence) const {   // [1, head, extra]
    FOVEA_ASSERT(is_open(sequence) && layer >= 0 && layer < shape().layers);
    return extra_view(layer, sequence, owned_.state.sequence[sequence].slot, 1);
  }

  // For cache/replay.hpp. `folded` tokens are in a layer's checkpoint, `checkpoint` should be; `done` tokens are in its
  // buffer or the checkpoint.
  index_t checkpoint(index_t sequence) const { return owned_.state.sequence[sequence].checkpoint; }
  index_t folded(index_t layer, index_t sequence) const { return owned_.state.folded[place(layer, sequence)]; }
  index_t done(index_t layer, index_t sequence) const { return owned_.state.done[place(layer, sequence)]; }
  void set_checkpoint(index_t sequence, index_t tokens) { owned_.state.sequence[sequence].checkpoint = tokens; }
  void set_folded(index_t layer, index_t sequence, index_t tokens) { owned_.state.folded[place(layer, sequence)] = tokens; }
  void set_done(index_t layer, index_t sequence, index_t tokens) { owned_.state.done[place(layer, sequence)] = tokens; }
  bool steps_begun(index_t sequence) const {
    return owned_.state.sequence[sequence].begun > 0 && owned_.state.sequence[sequence].steps;
  }
  ReplayTokens replayed(index_t layer, index_t sequence, index_t head) const {
    const State& s = owned_.state;
    ReplayTokens t = s.tokens;
    const index_t at = place(layer, sequence) * s.shape.heads + head;
    t.keys += at * s.capacity * t.key_stride;
    t.decays += at * s.capacity * t.decay_stride;
    t.values += at * s.capacity * t.value_stride;
    return t;
  }

  Status check_layer(index_t layer) const {
    if (layer >= 0 && layer < shape().layers) return {};
    return Status::error(Code::invalid_argument, "cache: layer %td of %td", layer, shape().layers);
  }
  Status check_open(index_t sequence) const {
    if (is_open(sequence)) return {};
    return Status::error(Code::invalid_argument, "cache: sequence %td of %td is not open", sequence, shape().sequences);
  }
  Status check_idle(index_t sequence) const {
    if (Status status = check_open(sequence); !status.ok() || owned_.state.sequence[sequence].begun == 0) return status;
    return Status::error(Code::invalid_argument, "cache: sequence %td has begun %td tokens; commit first", sequence,
                         owned_.state.sequence[sequence].begun);
  }

  // Whether the bookkeeping is sound; in a poisoned cache also whether what is closed or was rolled back is untouched.
  Status check() const {
    const State& s = owned_.state;
    const auto broken = [](const char* what, index_t n) {
      return Status::error(Code::invalid_argument, "cache: %s %td", what, n);
    };
    index_t open = 0, taken = 0;
    for (index_t n = 0; n < s.shape.sequences; ++n) open += s.sequence[n].open ? 1 : 0;
    for (index_t n = 0; n < s.shape.snapshots; ++n) taken += s.snapshot[n].taken ? 1 : 0;
    if (open + s.free_sequence_count != s.shape.sequences) return broken("sequences lost, open", open);
    if (taken + s.free_snapshot_count != s.shape.snapshots) return broken("snapshots lost, taken", taken);
    for (index_t i = 0; i < s.free_sequence_count; ++i) {
      const index_t n = s.free_sequences[i];
      if (s.sequence[n].open || std::find(s.free_sequences, s.free_sequences + i, n) != s.free_sequences + i)
        return broken("not free, or twice in the list: sequence", n);
    }
    for (index_t i = 0; i < s.free_snapshot_count; ++i) {
      const index_t n = s.free_snapshots[i];
      if (s.snapshot[n].taken || std::find(s.free_snapshots, s.free_snapshots + i, n) != s.free_snapshots + i)
        return broken("not free, or twice in the list: snapshot", n);
    }
    for (index_t n = 0; n < s.shape.sequences; ++n) {
      if (s.sequence[n].open ? !sequence_is_sound(n) : !is_poison(n)) return broken("unsound: sequence", n);
    }
    for (index_t n = 0; n < s.shape.snapshots; ++n) {
      if (!s.snapshot[n].taken && !is_poison(s.shape.sequences + n))
        return broken("written without being taken: snapshot", n);
    }
    return {};
  }

 private:
  static constexpr index_t kNothing = -1;

  struct Sequence {
    bool open = false, steps = false;   // steps: begun by begin_steps
    index_t slot = 0, len = 0, begun = 0, checkpoint = 0;
    index_t oldest_input = 0;   // the oldest input of the convolution that is not overwritten
  };
  struct Snapshot {
    bool taken = false;
    index_t len = 0, checkpoint = 0;
  };
  struct State {
    StateCacheShape shape{.layers = 0, .sequences = 0, .heads = 0};
    InputPlaces inputs;
    ReplayTokens tokens;        // of the first head
    index_t slots = 1;          // states per sequence
    index_t state_numbers = 0;   // a state of all heads, padded
    index_t capacity = 0;       // replayed tokens per sequence
    index_t free_sequence_count = 0, free_snapshot_count = 0, number_count = 0;
    float* numbers = nullptr;       // everything below up to the bookkeeping, number_count in one run
    // Slots outside of sequences, numbers beside the states outside of everything else: then what a call over adjacent
    // sequences reads and what it writes are ranges of memory that do not interleave, which mechanisms refuse.
    float* states = nullptr;        // [layer, slot, sequence, state_numbers]
    float* extras = nullptr;        // [layer, slot, extra, sequence, head]
    float* saved = nullptr;         // [layer, snapshot, saved_numbers()]
    float* conv = nullptr;          // [layer, sequence, row, channel]
    float* saved_conv = nullptr;    // [layer, snapshot, history, channel]
    Sequence* sequence = nullptr;   // [sequence]
    Snapshot* snapshot = nullptr;   // [snapshot]
    index_t* free_sequences = nullptr;
    index_t* free_snapshots = nullptr;
    index_t* tag = nullptr;      // [sequence, slot]  after how many tokens this was the state; kNothing = no state
    index_t* folded = nullptr;   // [layer, sequence or snapshot]
    index_t* done = nullptr;     // [layer, sequence or snapshot]
    index_t* kept = nullptr;     // [layer, sequence or snapshot]  inputs
  };

  static index_t padded(index_t numbers) { return (numbers + 15) / 16 * 16; }

  static Status check_shape(const StateCacheShape& s) {
    constexpr index_t kMost = 1 << 20;
    for (const index_t count : {s.layers, s.sequences, s.heads, s.dim_k, s.dim_v}) {
      if (count < 1 || count > kMost) {
        return Status::error(Code::invalid_argument,
                             "cache: %td layers, %td sequences, %td heads, dim_k %td, dim_v %td; each is 1 to %td", s.layers,
                             s.sequences, s.heads, s.dim_k, s.dim_v, kMost);
      }
    }
    for (const index_t count : {s.snapshots, s.extra, s.conv_channels, s.max_draft, s.replay}) {
      if (count < 0 || count > kMost) {
        return Status::error(Code::invalid_argument,
                             "cache: %td snapshots, %td numbers extra, %td channels, %td to draft, %td to replay; 0 to %td",
                             s.snapshots, s.extra, s.conv_channels, s.max_draft, s.replay, kMost);
      }
    }
    if (s.conv_channels > 0 && (s.conv_width < 2 || s.conv_width > 1024))
      return Status::error(Code::invalid_argument, "cache: a convolution of width %td has no state; 2 to 1024",
                           s.conv_width);
    if (s.layout > StateLayout::v_first)
      return Status::error(Code::invalid_argument, "cache: layout is %d, no value of the enum", static_cast<int>(s.layout));
    if (s.replay > 0 && s.extra > 0)
      return Status::error(Code::unsupported, "cache: %td numbers beside the state cannot be replayed", s.extra);
    const index_t members = s.sequences + s.snapshots, tokens = s.replay > 0 ? s.replay + s.max_draft : 0;
    const index_t slots = s.replay > 0 ? 1 : s.max_draft + 1;
    const auto too_much = [&](index_t each) {
      return limited_product({s.layers, members, each, index_t{sizeof(float)}}) >= kLargestCache / 4;
    };
    if (too_much(limited_product({slots, s.heads, s.dim_k, s.dim_v})) ||
        too_much(limited_product({slots, s.heads, s.extra})) ||
        too_much(limited_product({tokens, s.heads, 2 * s.dim_k + s.dim_v + 48})) ||
        too_much(limited_product({s.max_draft + 2 * s.conv_width, s.conv_channels}))) {
      return Status::error(Code::out_of_memory,
                           "cache: %td layers of %td sequences and %td snapshots, %td heads of %td x %td, are too much",
                           s.layers, s.sequences, s.snapshots, s.heads, s.dim_k, s.dim_v);
    }
    return {};
  }

  static void lay_out(Bump& bump, State& s, const StateCacheShape& shape) {
    s.shape = shape;
    s.slots = shape.replay > 0 ? 1 : shape.max_draft + 1;
    s.state_numbers = padded(shape.heads * shape.dim_k * shape.dim_v);
    s.capacity = shape.replay > 0 ? shape.replay + shape.max_draft : 0;
    if (shape.conv_channels > 0) s.inputs = InputPlaces(shape.conv_width, shape.max_draft);
    const index_t layers = shape.layers, members = shape.sequences + shape.snapshots;
    const index_t rows = layers * members * shape.heads * s.capacity;
    s.tokens.key_stride = padded(shape.dim_k);
    s.tokens.decay_stride = shape.channel_decay ? padded(shape.dim_k) : 1;
    s.tokens.value_stride = padded(shape.dim_v);
    s.tokens.capacity = s.capacity;
    const std::size_t before = bump.used();
    s.states = bump.take<float>(layers * s.slots * shape.sequences * s.state_numbers);
    s.extras = bump.take<float>(layers * s.slots * shape.extra * shape.sequences * shape.heads);
    s.saved = bump.take<float>(layers * shape.snapshots * saved_numbers(s));
    s.tokens.keys = bump.take<float>(rows * s.tokens.key_stride);
    s.tokens.decays = bump.take<float>(rows * s.tokens.decay_stride);
    s.tokens.values = bump.take<float>(rows * s.tokens.value_stride);
    s.conv = bump.take<float>(layers * shape.sequences * s.inputs.rows * shape.conv_channels);
    s.saved_conv = bump.take<float>(layers * shape.snapshots * s.inputs.history * shape.conv_channels);
    s.numbers = s.states;
    s.number_count = static_cast<index_t>((bump.used() - before) / sizeof(float));
    s.sequence = bump.take<Sequence>(shape.sequences);
    s.snapshot = bump.take<Snapshot>(shape.snapshots);
    s.free_sequences = bump.take<index_t>(shape.sequences);
    s.free_snapshots = bump.take<index_t>(shape.snapshots);
    s.tag = bump.take<index_t>(shape.sequences * s.slots);
    s.folded = bump.take<index_t>(layers * members);
    s.done = bump.take<index_t>(layers * members);
    s.kept = bump.take<index_t>(layers * members);
  }

  // A member is a sequence, or, counted on, a snapshot.
  index_t place(index_t layer, index_t member) const {
    return layer * (owned_.state.shape.sequences + owned_.state.shape.snapshots) + member;
  }
  static index_t saved_numbers(const State& s) { return s.state_numbers + s.shape.extra * s.shape.heads; }
  float* state_at(index_t layer, index_t sequence, index_t at) const {
    const State& s = owned_.state;
    return s.states + ((layer * s.slots + at) * s.shape.sequences + sequence) * s.state_numbers;
  }
  float* extra_at(index_t layer, index_t sequence, index_t at) const {
    const State& s = owned_.state;
    return s.extras + ((layer * s.slots + at) * s.shape.extra * s.shape.sequences + sequence) * s.shape.heads;
  }
  float* saved_slot(index_t layer, index_t snapshot) const {
    const State& s = owned_.state;
    return s.saved + (layer * s.shape.snapshots + snapshot) * saved_numbers(s);
  }
  float* inputs(index_t layer, index_t sequence) const {
    const State& s = owned_.state;
    return s.conv + (layer * s.shape.sequences + sequence) * s.inputs.rows * s.shape.conv_channels;
  }
  float* saved_inputs(index_t layer, index_t snapshot) const {
    const State& s = owned_.state;
    return s.saved_conv + (layer * s.shape.snapshots + snapshot) * s.inputs.history * s.shape.conv_channels;
  }
  index_t turned(index_t at, index_t by) const { return (at + by) % owned_.state.slots; }

  View<float, 4> state_view(index_t layer, index_t first, index_t at, index_t count) const {
    const State& s = owned_.state;
    const bool v_first = s.shape.layout == StateLayout::v_first;
    const index_t rows = v_first ? s.shape.dim_v : s.shape.dim_k, columns = v_first ? s.shape.dim_k : s.shape.dim_v;
    return {state_at(layer, first, at),
            {count, s.shape.heads, rows, columns},
            {s.state_numbers, rows * columns, columns, 1}};
  }
  View<float, 3> extra_view(index_t layer, index_t first, index_t at, index_t count) const {
    const State& s = owned_.state;
    return {extra_at(layer, first, at),
            {count, s.shape.heads, s.shape.extra},
            {s.shape.heads, 1, s.shape.sequences * s.shape.heads}};
  }
  template <int Rank>
  static View<const float, Rank> as_const(const View<float, Rank>& view) {
    return {view.data, view.extent, view.stride};
  }

  // The row that stands behind the ring once more.
  void mirror(index_t layer, index_t sequence, index_t input) const {
    const State& s = owned_.state;
    const index_t row = s.inputs.row(input), channels = s.shape.conv_channels;
    float* const rows = inputs(layer, sequence);
    if (s.shape.max_draft > 0 && row < s.inputs.history - 1)
      copy(rows + row * channels, rows + (s.inputs.ring + row) * channels, channels);
  }

  // The next `count` slots hold the states after `first`, first + 1, ... tokens as soon as they are written. A state that is
  // updated in place is lost at once, though nothing is poisoned: the call reads it.
  void claim(index_t sequence, index_t count, index_t first) {
    State& s = owned_.state;
    for (index_t n = 0; n < count; ++n) {
      const index_t at = turned(s.sequence[sequence].slot, n + 1);
      s.tag[sequence * s.slots + at] = first + n;
      if (s.slots > 1) poison_slot(sequence, at);
    }
  }
  void start(Sequence& mine, index_t sequence, index_t tokens, bool steps) {
    State& s = owned_.state;
    mine.begun = tokens;
    mine.steps = steps;
    mine.oldest_input = std::max(mine.oldest_input, s.inputs.oldest(mine.len + tokens));
    for (index_t layer = 0; layer < s.shape.layers; ++layer) s.kept[place(layer, sequence)] = mine.len;
  }
  // Slot 0 is the current one, the others hold nothing.
  void forget_slots(index_t sequence, index_t len) {
    State& s = owned_.state;
    for (index_t at = 0; at < s.slots; ++at) {
      s.tag[sequence * s.slots + at] = at == 0 ? len : kNothing;
      if (at > 0) poison_slot(sequence, at);
    }
  }
  void set_layers(index_t member, index_t is_folded, index_t is_done) {
    State& s = owned_.state;
    for (index_t layer = 0; layer < s.shape.layers; ++layer) {
      s.folded[place(layer, member)] = is_folded;
      s.done[place(layer, member)] = is_done;
      s.kept[place(layer, member)] = is_done;
    }
  }

  // Whether a state and a history of position `pos` exist; drafts that were begun count.
  Status check_position(index_t sequence, index_t pos) const {
    const State& s = owned_.state;
    const Sequence& mine = s.sequence[sequence];
    bool held = replays() && pos >= mine.checkpoint;
    for (index_t at = 0; !replays() && at < s.slots; ++at) held = held || s.tag[sequence * s.slots + at] == pos;
    if (!held) {
      return Status::error(
          Code::invalid_argument,
          "cache: sequence %td has no state after %td tokens; %td are committed, %td begun, max_draft is %td", sequence, pos,
          mine.len, mine.begun, s.shape.max_draft);
    }
    if (s.shape.conv_channels > 0 && pos - s.inputs.history < mine.oldest_input) {
      return Status::error(Code::invalid_argument,
                           "cache: after %td tokens sequence %td needs input %td of the convolution; the oldest is %td", pos,
                           sequence, pos - s.inputs.history, mine.oldest_input);
    }
    return {};
  }
  void stand_at(index_t sequence, index_t pos) {
    State& s = owned_.state;
    Sequence& mine = s.sequence[sequence];
    for (index_t at = 0; !replays() && at < s.slots; ++at) {
      index_t& tag = s.tag[sequence * s.slots + at];
      if (tag == pos) mine.slot = at;
      if (tag <= pos) continue;
      tag = kNothing;
      poison_slot(sequence, at);
    }
    for (index_t layer = 0; replays() && layer < s.shape.layers; ++layer) {
      index_t& end = s.done[place(layer, sequence)];
      for (index_t token = pos; token < end; ++token) poison_token(layer, sequence, token);
      end = pos;
    }
    mine.len = pos;
    mine.begun = 0;
    mine.steps = false;
  }

  void copy_tokens(index_t layer, index_t from, index_t to, index_t len) {
    State& s = owned_.state;
    s.folded[place(layer, to)] = s.folded[place(layer, from)];
    s.done[place(layer, to)] = s.kept[place(layer, to)] = len;
    for (index_t head = 0; replays() && head < s.shape.heads; ++head) {
      const ReplayTokens source = replayed(layer, from, head), target = replayed(layer, to, head);
      for (index_t token = s.folded[place(layer, from)]; token < len; ++token) {
        copy(source.key(token), target.key(token), source.key_stride);
        copy(source.decay(token), target.decay(token), source.decay_stride);
        copy(source.value(token), target.value(token), source.value_stride);
      }
    }
  }

  static void copy(const float* from, float* to, index_t count) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
  }
  static void zero(float* to, index_t count) {
    if (count > 0) std::fill_n(to, count, 0.f);
  }
  void poison(float* from, index_t count) const {
    if (owned_.state.shape.poison && count > 0)
      std::memset(static_cast<void*>(from), 0xff, static_cast<std::size_t>(count) * sizeof(float));
  }
  void poison_slot(index_t sequence, index_t at) const {
    const State& s = owned_.state;
    for (index_t layer = 0; s.shape.poison && layer < s.shape.layers; ++layer)
      each_run_of_slot(layer, sequence, at, [&](float* from, index_t count) { poison(from, count); });
  }
  void poison_token(index_t layer, index_t sequence, index_t token) const {
    const State& s = owned_.state;
    for (index_t head = 0; s.shape.poison && head < s.shape.heads; ++head) {
      const ReplayTokens t = replayed(layer, sequence, head);
      poison(t.key(token), t.key_stride);
      poison(t.decay(token), t.decay_stride);
      poison(t.value(token), t.value_stride);
    }
  }

  // f(numbers, count) for all runs of numbers of one slot of a layer and sequence.
  template <class F>
  void each_run_of_slot(index_t layer, index_t sequence, index_t at, F&& f) const {
    const State& s = owned_.state;
    f(state_at(layer, sequence, at), s.state_numbers);
    for (index_t e = 0; e < s.shape.extra; ++e)
      f(extra_at(layer, sequence, at) + e * s.shape.sequences * s.shape.heads, s.shape.heads);
  }
  // The same for everything that belongs to a member.
  template <class F>
  void each_run_of(index_t member, F&& f) const {
    const State& s = owned_.state;
    const bool is_sequence = member < s.shape.sequences;
    const index_t snapshot = member - s.shape.sequences, channels = s.shape.conv_channels;
    for (index_t layer = 0; layer < s.shape.layers; ++layer) {
      if (is_sequence) {
        for (index_t at = 0; at < s.slots; ++at) each_run_of_slot(layer, member, at, f);
        f(inputs(layer, member), s.inputs.rows * channels);
      } else {
        f(saved_slot(layer, snapshot), saved_numbers(s));
        f(saved_inputs(layer, snapshot), s.inputs.history * channels);
      }
      if (!replays()) continue;
      const ReplayTokens t = replayed(layer, member, 0);
      f(t.keys, s.shape.heads * s.capacity * t.key_stride);
      f(t.decays, s.shape.heads * s.capacity * t.decay_stride);
      f(t.values, s.shape.heads * s.capacity * t.value_stride);
    }
  }
  static bool holds_poison(const float* from, index_t count) {
    const auto* const bytes = reinterpret_cast<const unsigned char*>(from);
    const index_t size = count * index_t{sizeof(float)};
    return std::all_of(bytes, bytes + size, [](unsigned char byte) { return byte == 0xff; });
  }
  bool is_poison(index_t member) const {
    bool untouched = true;
    if (!owned_.state.shape.poison) return untouched;
    each_run_of(member, [&](const float* from, index_t count) { untouched = untouched && holds_poison(from, count); });
    return untouched;
  }

  bool sequence_is_sound(index_t n) const {
    const State& s = owned_.state;
    const Sequence& mine = s.sequence[n];
    const index_t end = mine.len + mine.begun;
    if (mine.len < 0 || mine.begun < 0 || mine.slot < 0 || mine.slot >= s.slots) return false;
    if (s.shape.conv_channels > 0 && (end - mine.oldest_input > s.inputs.ring || mine.oldest_input > end - s.inputs.history))
      return false;
    if (replays()) {
      if (mine.checkpoint > end) return false;
      for (index_t layer = 0; layer < s.shape.layers; ++layer) {
        const index_t is_folded = folded(layer, n), is_done = done(layer, n);
        if (is_folded > mine.checkpoint || is_done > end || is_done < is_folded || end - mine.checkpoint > s.capacity)
          return false;
      }
      return true;
    }
    const index_t* const tag = s.tag + n * s.slots;
    if (mine.begun == 0 && tag[mine.slot] != mine.len) return false;
    for (index_t at = 0; at < s.slots; ++at) {
      if (tag[at] > end) return false;
      if (tag[at] != kNothing && std::find(tag, tag + at, tag[at]) != tag + at) return false;
      bool untouched = true;
      for (index_t layer = 0; s.shape.poison && tag[at] == kNothing && layer < s.shape.layers; ++layer) {
        each_run_of_slot(layer, n, at,
                         [&](const float* from, index_t count) { untouched = untouched && holds_poison(from, count); });
      }
      if (!untouched) return false;
    }
    return true;
  }

  Status check_taken(index_t snapshot) const {
    if (is_taken(snapshot)) return {};
    return Status::error(Code::invalid_argument, "cache: snapshot %td of %td is not taken", snapshot, shape().snapshots);
  }
  Status check_run(index_t first, index_t count) const {
    if (first < 0 || count < 1 || first > shape().sequences - count) {
      return Status::error(Code::invalid_argument, "cache: sequences %td to %td of %td", first, first + count - 1,
                           shape().sequences);
    }
    for (index_t n = first; n < first + count; ++n) {
      if (Status status = check_open(n); !status.ok()) return status;
    }
    return {};
  }
  Status check_begin(index_t sequence, index_t tokens, index_t most) const {
    if (Status status = check_idle(sequence); !status.ok()) return status;
    if (tokens < 1 || tokens > most || tokens > kLargestCache - len(sequence)) {
      return Status::error(Code::invalid_argument, "cache: %td tokens to begin, at least 1 and at most %td", tokens,
                           std::min(most, kLargestCache - len(sequence)));
    }
    return {};
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
