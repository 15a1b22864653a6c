// SPDX-License-Identifier: Apache-2.0
// Keys and values in any format and any home, exact-size and poisoned, and what attention over them must come to.
#pragma once
#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "all_formats.hpp"
#include "catch_compat.hpp"
#include "fovea/reference/stored.hpp"
#include "fovea/simd/quantise.hpp"
#include "random.hpp"
#include "tolerance.hpp"

namespace test {

using fovea::Causal;
using fovea::Format;
using fovea::Home;
using fovea::Kv;
using fovea::Panels;
using fovea::Regime;
using fovea::Window;

inline constexpr std::byte kPoison{0xff};   // NaN in every floating format and in every scale
inline constexpr Format kAllFormats[fovea::kFormats] = {
    Format::f32,        Format::f64,    Format::bf16,      Format::f16,         Format::i8_token,
    Format::i8_channel, Format::i4_g32, Format::i4_g64,    Format::i4_g32_zero, Format::i4_g64_zero,
    Format::e4m3,       Format::e5m2,   Format::latent_fp8};

inline const char* regime_name(Regime regime) {
  constexpr const char* names[] = {"automatic", "prefill", "decode", "wide_decode"};
  return names[static_cast<int>(regime)];
}
inline const char* home_name(Home home) {
  constexpr const char* names[] = {"contiguous", "paged", "ring"};
  return names[static_cast<int>(home)];
}

inline std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

inline std::vector<index_t> cumulative(const std::vector<index_t>& lens) {
  std::vector<index_t> sums{0};
  for (const index_t len : lens) sums.push_back(sums.back() + len);
  return sums;
}

inline std::vector<float> random_numbers(std::uint64_t seed, index_t count, float spread = 1) {
  Random random(seed);
  std::vector<float> numbers(at(count));
  for (float& x : numbers) x = spread * random.normal();
  return numbers;
}

inline void put_number(Format format, double x, std::byte* to) {
  const auto put = [to](auto value) { std::memcpy(to, &value, sizeof value); };
  switch (format) {
    case Format::f64:
      return put(x);
    case Format::bf16:
      return put(fovea::convert<fovea::bf16>(x));
    case Format::f16:
      return put(fovea::convert<fovea::f16>(x));
    default:
      return put(static_cast<float>(x));
  }
}

// [token, head, dim] in a plain format, `gap` numbers of poison behind every head. One memory is both the ragged tensor of
// all tokens and, where sequences are equally long, the batch of them.
class Tokens {
 public:
  Format format = Format::f32;
  index_t tokens = 0, heads = 0, dim = 0, gap = 0;
  std::vector<std::byte> bytes;
  std::vector<float> values;   // [token, head, dim]: what is stored, rounded to fp32

  Tokens() = default;
  Tokens(Format format_, index_t tokens_, index_t heads_, index_t dim_, index_t gap_ = 0)
      : format(format_), tokens(tokens_), heads(heads_), dim(dim_), gap(gap_) {
    const index_t rows = tokens * heads;
    bytes.assign(at(rows == 0 ? 0 : (rows * (dim + gap) - gap) * number()), kPoison);
  }
  void fill(const std::vector<float>& numbers) {
    for (index_t row = 0; row < tokens * heads; ++row) {
      for (index_t d = 0; d < dim; ++d) {
        // f64 gets digits that fp32 does not have.
        const double x = double{numbers[at(row * dim + d)]} * (1 + 1e-9);
        put_number(format, format == Format::f64 ? x : double{numbers[at(row * dim + d)]}, place(row, d));
      }
    }
    read();
  }
  void read() {
    values.clear();
    for (index_t row = 0; row < tokens * heads; ++row) {
      for (index_t d = 0; d < dim; ++d)
        values.push_back(static_cast<float>(fovea::reference::stored_value(format, place(row, d), 1, 0)));
    }
  }
  index_t number() const { return fovea::row_bytes(format, 1); }
  std::byte* place(index_t row, index_t d) { return bytes.data() + (row * (dim + gap) + d) * number(); }
  double value(index_t row, index_t d) const {
    return fovea::reference::stored_value(format, bytes.data() + (row * (dim + gap) + d) * number(), 1, 0);
  }

  // [batch, head, pos, dim]
  template <class Shaped>
  Shaped view(index_t batch) {
    Shaped shaped;
    const index_t row = dim + gap, len = tokens / std::max<index_t>(batch, 1);
    shaped.data = bytes.data();
    shaped.format = format;
    shaped.extent = {batch, heads, len, dim};
    shaped.stride = {len * heads * row, row, heads * row, 1};
    return shaped;
  }
  fovea::Operand operand(index_t batch = 1) { return view<fovea::Operand>(batch); }
  fovea::Result result(index_t batch = 1) { return view<fovea::Result>(batch); }
  Tensor<const float> floats() const { return fovea::ragged(values.data(), tokens, heads, dim); }

  bool gaps_intact() const {
    for (index_t row = 0; row + 1 < tokens * heads; ++row) {
      for (index_t n = dim * number(); n < (dim + gap) * number(); ++n) {
        if (bytes[at(row * (dim + gap) * number() + n)] != kPoison) return false;
      }
    }
    return true;
  }
};

// Where a call writes; unwritten memory is poison.
struct Answer {
  Tokens out;
  std::vector<float> lse;   // [head, token]

  Answer(Format format, index_t tokens, index_t heads, index_t dim, index_t gap = 0)
      : out(format, tokens, heads, dim, gap), lse(at(tokens * heads), std::bit_cast<float>(0xffffffffu)) {}
  View<float, 3> lse_view(index_t batch = 1) {
    const index_t len = out.tokens / std::max<index_t>(batch, 1);
    return {lse.data(), {batch, out.heads, len}, {len, out.tokens, 1}};
  }
  bool operator==(const Answer& other) const {
    return out.bytes == other.out.bytes && lse.size() == other.lse.size() &&
           (lse.empty() || std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0);
  }
  bool untouched() const {
    const auto* const bytes = reinterpret_cast<const std::byte*>(lse.data());
    return std::all_of(out.bytes.begin(), out.bytes.end(), [](std::byte b) { return b == kPoison; }) &&
           std::all_of(bytes, bytes + lse.size() * sizeof(float), [](std::byte b) { return b == kPoison; });
  }
  bool has_nan() const {
    for (index_t row = 0; row < out.tokens * out.heads; ++row) {
      for (index_t d = 0; d < out.dim; ++d) {
        if (std::isnan(out.value(row, d))) return true;
      }
    }
    return std::any_of(lse.begin(), lse.end(), [](float x) { return std::isnan(x); });
  }
};

// The rows of tokens [first, first + count) of a and of b, which starts at token 0.
inline bool same_tokens(const Answer& a, index_t first, const Answer& b) {
  const index_t heads = a.out.heads, row = (a.out.dim + a.out.gap) * a.out.number();
  for (index_t token = 0; token < b.out.tokens; ++token) {
    for (index_t h = 0; h < heads; ++h) {
      const index_t from = ((first + token) * heads + h) * row, to = (token * heads + h) * row;
      if (std::memcmp(a.out.bytes.data() + from, b.out.bytes.data() + to, at(a.out.dim * a.out.number())) != 0) return false;
      if (std::memcmp(&a.lse[at(h * a.out.tokens + first + token)], &b.lse[at(h * b.out.tokens + token)], sizeof(float)) !=
          0)
        return false;
    }
  }
  return true;
}

// Rows of one format, [token, head], and the numbers they stand for. Every format's numbers are fp32 numbers, f64's after
// the rounding that kernels make too: nothing that is said about attention over `values` has to allow for decoding.
class Rows {
 public:
  Format format = Format::f32;
  index_t tokens = 0, heads = 0, dim = 0, bytes = 0;
  std::vector<std::byte> data;        // [token, head, bytes]
  std::vector<float> values;          // [token, head, dim]
  std::vector<float> channel_scale;   // [head, dim], i8_channel only

  Rows() = default;
  // numbers [token, head, dim]
  Rows(Format format_, index_t heads_, index_t dim_, const std::vector<float>& numbers, bool is_k = true)
      : format(format_),
        tokens(static_cast<index_t>(numbers.size()) / std::max<index_t>(heads_ * dim_, 1)),
        heads(heads_),
        dim(dim_),
        bytes(fovea::row_bytes(format_, dim_)) {
    if (format == Format::i8_channel && is_k) {
      channel_scale.assign(at(heads * dim), 0.f);
      fovea::widen_channels(fovea::ragged(numbers.data(), tokens, heads, dim), channel_scale.data());
      fovea::channel_scales(channel_scale.data(), heads * dim, channel_scale.data());
    }
    data.assign(at(tokens * heads * bytes), kPoison);
    values.assign(at(tokens * heads * dim), 0.f);
    std::vector<float> wide(at(fovea::kLatentFp8Dim), 0.25f);
    for (index_t row = 0; row < tokens * heads; ++row) {
      const float* from = numbers.data() + row * dim;
      // Values are the head of a latent row.
      const bool cut = format == Format::latent_fp8 && dim < fovea::kLatentFp8Dim;
      if (cut) from = std::copy_n(from, dim, wide.data()) - dim;
      const float* const scale = channel_scale.empty() ? nullptr : channel_scale.data() + row % heads * dim;
      fovea::quantise_row(format, from, 1, cut ? fovea::kLatentFp8Dim : dim, scale, data.data() + row * bytes);
    }
    read();
  }
  void read() {
    for (index_t row = 0; row < tokens * heads; ++row) {
      const float* const scale = channel_scale.empty() ? nullptr : channel_scale.data() + row % heads * dim;
      for (index_t d = 0; d < dim; ++d) {
        const double value = fovea::reference::stored_value(format, data.data() + row * bytes, dim, d, scale);
        values[at(row * dim + d)] = static_cast<float>(value);
      }
    }
  }
  const std::byte* row(index_t token, index_t head) const { return data.data() + (token * heads + head) * bytes; }
  Tensor<const float> floats() const { return fovea::ragged(values.data(), tokens, heads, dim); }
};

// The exact keys of a mixed cache whose other keys are `k`: numbers [token, head, dim] divided by k's scales per channel, if it
// has any, and values times them. That product is rounded to fp32: the fifth of the 6 u that a score may be off beside its sum
// (docs/numerics.md), after the scales per channel, the scale, its rounded constant, and a row's own scale.
inline Rows beside(const Rows& k, Format format, std::vector<float> numbers) {
  if (k.channel_scale.empty()) return Rows(format, k.heads, k.dim, numbers);
  const std::vector<float>& scale = k.channel_scale;
  if (format == k.format) {
    Rows exact = k;
    exact.channel_scale.clear();   // the call has them
    return exact;
  }
  for (std::size_t n = 0; n < numbers.size(); ++n) numbers[n] /= scale[n % scale.size()];
  Rows exact(format, k.heads, k.dim, numbers);
  for (std::size_t n = 0; n < numbers.size(); ++n) exact.values[n] *= scale[n % scale.size()];
  return exact;
}

// V as the first numbers of the rows of K.
inline Rows head_of(const Rows& k, index_t dim_v) {
  Rows v = k;
  v.dim = dim_v;
  v.values.assign(at(v.tokens * v.heads * dim_v), 0.f);
  v.read();
  return v;
}

enum class Weave { head_major, token_major, interleaved, v_in_k };

// Where rows go, and what surrounds them.
struct Lodging {
  Home home = Home::contiguous;
  Weave weave = Weave::head_major;
  bool ragged = false;   // contiguous: one entry, sequences one after the other
  index_t spare = 3;     // slots per entry, or pages, that nobody uses
  index_t gap = 0;       // bytes between rows
  index_t page_size = 16;
  bool csr = false;
  bool share_pages = false;   // pages of equal rows are one page
  index_t sinks = 0;
  std::uint64_t seed = 1;             // order of pages, turn of rings
  std::byte fill = kPoison;           // of everything that is no row in use
  std::int32_t behind = 2147480000;   // table entries behind the last page in use
  index_t columns_behind = 2;         // how many of them a row of the block table has at least
};

inline std::string describe(const Lodging& l) {
  constexpr const char* weaves[] = {"head-major", "token-major", "interleaved", "V in K"};
  char text[200];
  std::snprintf(text, sizeof text, "%s%s, %s, spare %td, gap %td, pages of %td%s%s, %td sinks, seed %llu", home_name(l.home),
                l.ragged ? " ragged" : "", weaves[static_cast<int>(l.weave)], l.spare, l.gap, l.page_size,
                l.csr ? " in lists" : "", l.share_pages ? ", shared" : "", l.sinks, static_cast<unsigned long long>(l.seed));
  return text;
}

// tokens[s][j] is the row of key j of sequence s, -1 where this home keeps none.
using Placement = std::vector<std::vector<index_t>>;

inline Placement consecutive(const std::vector<index_t>& lens) {
  Placement all;
  index_t next = 0;
  for (const index_t len : lens) {
    all.emplace_back(at(len));
    std::iota(all.back().begin(), all.back().end(), next);
    next += len;
  }
  return all;
}

// Owns pools, tables and rings; exactly as many bytes as the rows reach.
class Housed {
 public:
  std::vector<std::byte> k_pool, v_pool;
  std::vector<std::int32_t> table;
  std::vector<index_t> page_begin, ring_begin, cu_len;
  index_t width = 0;   // of the block table

  Housed(const Rows& k, const Rows& v, const Placement& tokens, const Lodging& how) : k_(&k), v_(&v), how_(how) {
    Random random(how.seed);
    const auto sequences = static_cast<index_t>(tokens.size());
    index_t longest = 0, total = 0;
    for (const auto& list : tokens) {
      longest = std::max(longest, static_cast<index_t>(list.size()));
      total += static_cast<index_t>(list.size());
    }
    if (how.home == Home::paged) {
      lay_pages(tokens, random);
    } else if (how.home == Home::ring) {
      batch_ = sequences;
      len_ = std::max(longest, how.sinks + 1) + how.spare;
      for (index_t s = 0; s < sequences; ++s) ring_begin.push_back(random.below(len_ - how.sinks));
    } else if (how.ragged) {
      batch_ = 1;
      cu_len.push_back(0);
      for (const auto& list : tokens) cu_len.push_back(cu_len.back() + static_cast<index_t>(list.size()));
      len_ = total + how.spare;
    } else {
      batch_ = sequences;
      len_ = longest + how.spare;
    }
    make_pools();
    for (index_t s = 0; s < sequences; ++s) {
      for (index_t j = 0; j < static_cast<index_t>(tokens[at(s)].size()); ++j) {
        const index_t token = tokens[at(s)][at(j)];
        if (token < 0) continue;
        for (index_t h = 0; h < k.heads; ++h) {
          const auto [entry, position] = place(s, j);
          std::memcpy(k_at(entry, h, position), k.row(token, h), at(k.bytes));
          if (how.weave != Weave::v_in_k) std::memcpy(v_at(entry, h, position), v.row(token, h), at(v.bytes));
        }
      }
    }
  }
  Housed(const Housed&) = delete;
  Housed& operator=(const Housed&) = delete;

  struct Slot {
    index_t entry, position;
  };
  Slot place(index_t s, index_t j) const {
    switch (how_.home) {
      case Home::paged: {
        const index_t page = j / how_.page_size;
        return {table[at(how_.csr ? page_begin[at(s)] + page : s * width + page)], j % how_.page_size};
      }
      case Home::ring:
        return {s, j < how_.sinks ? j : how_.sinks + (ring_begin[at(s)] + j - how_.sinks) % (len_ - how_.sinks)};
      default:
        return how_.ragged ? Slot{0, cu_len[at(s)] + j} : Slot{s, j};
    }
  }
  std::byte* k_at(index_t entry, index_t head, index_t position) {
    return k_pool.data() + entry * k_stride_[0] + head * k_stride_[1] + position * k_stride_[2];
  }
  std::byte* v_at(index_t entry, index_t head, index_t position) {
    std::byte* const base = how_.weave == Weave::interleaved ? k_pool.data() + v_offset_ : v_pool.data();
    return base + entry * v_stride_[0] + head * v_stride_[1] + position * v_stride_[2];
  }

  Kv kv() const {
    Kv kv;
    kv.k = {k_pool.data(), k_->format, k_stride_};
    kv.v = {how_.weave == Weave::v_in_k        ? k_pool.data()
            : how_.weave == Weave::interleaved ? k_pool.data() + (k_pool.empty() ? 0 : v_offset_)
                                               : v_pool.data(),
            v_->format, how_.weave == Weave::v_in_k ? k_stride_ : v_stride_};
    kv.kv_heads = k_->heads;
    kv.dim_qk = k_->dim;
    kv.dim_v = v_->dim;
    kv.batch = batch_;
    kv.len = len_;
    kv.home = how_.home;
    if (how_.home == Home::paged) {
      if (how_.csr) {
        kv.page_indices = table;
        kv.page_begin = page_begin;
      } else {
        kv.block_table = {table.data(), {static_cast<index_t>(page_begin.size()) - 1, width}, {width, 1}};
      }
    }
    if (how_.home == Home::ring) {
      kv.sinks = how_.sinks;
      kv.ring_begin = ring_begin;
    }
    if (!k_->channel_scale.empty()) kv.k_channel_scale = k_->channel_scale.data();
    return kv;
  }
  index_t pages() const { return batch_; }

 private:
  const Rows* k_;
  const Rows* v_;
  Lodging how_;
  index_t batch_ = 0, len_ = 0, v_offset_ = 0;
  std::array<index_t, 3> k_stride_{}, v_stride_{};

  void lay_pages(const Placement& tokens, Random& random) {
    len_ = how_.page_size;
    std::map<std::vector<index_t>, std::int32_t> known;
    std::vector<std::vector<std::int32_t>> pages;
    std::int32_t used = 0;
    for (const auto& list : tokens) {
      pages.emplace_back();
      for (std::size_t j = 0; j < list.size(); j += at(len_)) {
        const std::vector<index_t> page(list.begin() + static_cast<index_t>(j),
                                        list.begin() + static_cast<index_t>(std::min(j + at(len_), list.size())));
        const auto found = how_.share_pages ? known.find(page) : known.end();
        if (found == known.end() && how_.share_pages) known[page] = used;
        pages.back().push_back(found == known.end() ? used++ : found->second);
      }
      width = std::max(width, static_cast<index_t>(pages.back().size()));
    }
    width += how_.columns_behind;
    table.reserve(1);   // a table without entries is a table, not null
    batch_ = used + how_.spare;
    std::vector<std::int32_t> order(at(batch_));
    std::iota(order.begin(), order.end(), 0);
    for (index_t n = batch_ - 1; n > 0; --n) std::swap(order[at(n)], order[at(random.below(n + 1))]);
    page_begin.push_back(0);
    for (const auto& list : pages) {
      for (const std::int32_t page : list) table.push_back(order[at(page)]);
      const index_t fillers = how_.csr ? random.below(how_.columns_behind + 1) : width - static_cast<index_t>(list.size());
      table.insert(table.end(), at(fillers), how_.behind);
      page_begin.push_back(static_cast<index_t>(table.size()));
    }
  }

  void make_pools() {
    const auto strides = [&](index_t row, index_t step) -> std::array<index_t, 3> {
      if (how_.weave == Weave::head_major || how_.weave == Weave::v_in_k)
        return {k_->heads * len_ * step, len_ * step, step};
      return {len_ * k_->heads * step, row, k_->heads * step};
    };
    const auto reach = [&](const std::array<index_t, 3>& stride, index_t row) {
      if (batch_ == 0 || len_ == 0) return index_t{0};
      return (batch_ - 1) * stride[0] + (k_->heads - 1) * stride[1] + (len_ - 1) * stride[2] + row;
    };
    if (how_.weave == Weave::interleaved) {
      const index_t pair = k_->bytes + how_.gap + v_->bytes + how_.gap;
      k_stride_ = v_stride_ = strides(pair, pair);
      v_offset_ = k_->bytes + how_.gap;
      k_pool.assign(at(reach(v_stride_, v_->bytes) + (batch_ == 0 || len_ == 0 ? 0 : v_offset_)), how_.fill);
      return;
    }
    const index_t k_step = k_->bytes + how_.gap, v_step = v_->bytes + how_.gap;
    k_stride_ = strides(k_step, k_step);
    v_stride_ = strides(v_step, v_step);
    k_pool.assign(at(reach(k_stride_, k_->bytes)), how_.fill);
    if (how_.weave != Weave::v_in_k) v_pool.assign(at(reach(v_stride_, v_->bytes)), how_.fill);
  }
};

// K and V of some sequences, all tokens one after the other.
struct Keys {
  Rows k, v;
  std::vector<index_t> len;

  Keys(std::uint64_t seed, Format k_format, Format v_format, index_t heads, index_t dim_qk, index_t dim_v,
       const std::vector<index_t>& len_)
      : Keys(k_format, v_format, heads, dim_qk, dim_v, len_, random_numbers(seed, cumulative(len_).back() * heads * dim_qk),
             random_numbers(seed + 1, cumulative(len_).back() * heads * dim_v)) {}
  Keys(Format k_format, Format v_format, index_t heads, index_t dim_qk, index_t dim_v, const std::vector<index_t>& len_,
       const std::vector<float>& k_numbers, const std::vector<float>& v_numbers)
      : k(k_format, heads, dim_qk, k_numbers), v(v_format, heads, dim_v, v_numbers, false), len(len_) {}
};

inline Tokens random_queries(std::uint64_t seed, index_t tokens, index_t heads, index_t dim, Format format = Format::f32) {
  Tokens q(format, tokens, heads, dim);
  q.fill(random_numbers(seed, tokens * heads * dim));
  return q;
}

inline Answer attend_stored(Tokens& q, const Kv& kv, AttentionOptions options, index_t batch = 1, Format out = Format::f32) {
  Answer answer(out, q.tokens, q.heads, kv.dim_v);
  options.lse = answer.lse_view(batch);
  const fovea::Status status = attend_all(q.operand(batch), kv, answer.out.result(batch), options);
  INFO(status.message());
  REQUIRE(status.ok());
  return answer;
}

// What equal bits are promised in: a regime, with panels where it packs.
struct Way {
  Regime regime;
  Panels panels;
};
inline std::vector<Way> ways(Format k, Format v) {
  std::vector<Way> all{{Regime::prefill, Panels::f32}, {Regime::decode, Panels::f32}, {Regime::wide_decode, Panels::f32}};
  const auto narrow = [](Format format) { return format != Format::f32 && format != Format::f64; };
  if (fovea::kHasBf16Dot && narrow(k) && narrow(v)) {
    for (const Regime regime : {Regime::prefill, Regime::wide_decode}) all.push_back({regime, Panels::bf16});
  }
  return all;
}
inline std::string describe(const Way& way) {
  return std::string(regime_name(way.regime)) + (way.panels == Panels::bf16 ? ", bf16 panels" : ", f32 panels");
}

// One pair of each kind of format.
struct FormatPair {
  Format k, v;
};
inline constexpr FormatPair kFormatPairs[] = {{Format::f32, Format::f32},          {Format::bf16, Format::bf16},
                                              {Format::f16, Format::f64},          {Format::i8_token, Format::i8_token},
                                              {Format::i8_channel, Format::bf16},  {Format::i4_g32, Format::i4_g64_zero},
                                              {Format::i4_g32_zero, Format::e5m2}, {Format::e4m3, Format::e4m3}};
inline std::string describe(const FormatPair& pair) {
  return std::string("K ") + name_of(pair.k) + ", V " + name_of(pair.v);
}

// Unit roundoff of bf16: 8 significant bits.
inline constexpr double kUnitBf16 = 0x1p-8;

// Which of q, k and v bf16 panels have to round: what is stored as bf16 goes through unchanged, unless scales per channel
// are multiplied into the query.
struct Rounded {
  bool q = true, k = true, v = true;
};

// As expect() in tolerance.hpp, over ragged tokens, for either panel type. With bf16 panels, u = 2^-8, every product of a
// score carries up to (1 + u)^2, so a score is off by ((1 + u)^2 - 1) |scale| sum |q_d k_d| more; every product of an
// output carries the roundings of its weight and its value, ((1 + u)^2 - 1) p |v| each; the normaliser adds unrounded
// weights. `packed[sequence]` says whether that sequence goes through panels at all.
inline Expected expect_stored(Tensor<const float> q, Tensor<const float> k, Tensor<const float> v,
                              const AttentionOptions& options, const std::vector<bool>& packed = {}, Rounded rounded = {}) {
  const index_t heads = q.extent[1], len = q.extent[2], dim_v = v.extent[3], group = heads / k.extent[1];
  const auto rows = at(heads * len), numbers = rows * at(dim_v);
  Expected e{heads,
             len,
             dim_v,
             std::vector<double>(numbers),
             std::vector<double>(numbers),
             std::vector<double>(rows),
             std::vector<double>(rows)};
  const Tensor<double> out = fovea::bhsd(e.out.data(), 1, heads, len, dim_v);
  const View<double, 3> lse{e.lse.data(), {1, heads, len}, {heads * len, len, 1}};
  std::vector<double> magnitude(at(dim_v)), spread(magnitude);
  fovea::reference::softmax(q, k, v, out, options, lse, [&](const fovea::reference::SoftmaxRow& row) {
    const bool narrow = !packed.empty() && packed[at(row.sequence)];
    const double in_score = narrow ? std::pow(1 + kUnitBf16, rounded.q + rounded.k) - 1 : 0;
    const double in_sum = narrow ? std::pow(1 + kUnitBf16, 1 + rounded.v) - 1 : 0;
    std::fill(magnitude.begin(), magnitude.end(), 0.);
    std::fill(spread.begin(), spread.end(), 0.);
    double mean_error = 0;
    for (const auto& term : row.terms) {
      const double score = score_error(term, q.extent[3], options, row.max) + in_score * term.dots;
      const double relative = std::expm1(score + kExpUnits * kUnit);
      mean_error += term.weight * relative;
      const double of_product = (1 + relative) * (1 + in_sum) - 1;
      const float* const v_row = &v(0, row.q_head / group, row.first_k + term.key, 0);
      for (index_t d = 0; d < dim_v; ++d) {
        const double part = term.weight * std::abs(double{v_row[d * v.stride[3]]});
        magnitude[at(d)] += part;
        spread[at(d)] += part * of_product;
      }
    }
    if (std::isfinite(row.sink)) {
      const double relative = std::expm1(kUnit * (4 * (std::abs(row.sink) + std::abs(row.max)) + kExpUnits));
      mean_error += std::exp(row.sink - row.lse) * relative;
    }
    const auto terms = static_cast<index_t>(row.terms.size());
    const double common = mean_error + sum_error(terms, terms == 0 ? 0 : row.terms.back().key - row.terms.front().key + 1);
    const auto n = at(row.q_head * len + row.pos_q);
    for (std::size_t d = 0; d < at(dim_v); ++d)
      e.out_error[n * at(dim_v) + d] = spread[d] + common * (1 + in_sum) * magnitude[d] + 1e-30;
    e.lse_error[n] =
        std::isfinite(row.lse) ? common + kUnit * (kLogUnits * 16 + 4 * (std::abs(row.max) + std::abs(row.lse))) : 0;
  });
  return e;
}

// The rounding of an output to its format: half a unit in the last place of what was to be stored, which may itself be off
// by `budget`, or half the smallest denormal.
inline double stored_budget(Format format, double expected, double budget) {
  const double unit = format == Format::bf16 ? 0x1p-8 : format == Format::f16 ? 0x1p-11 : 0;
  const double denormal = format == Format::f16 ? 0x1p-25 : 0;
  return budget + unit * (std::abs(expected) + budget) + denormal;
}

struct WorstOf {
  double budgets = 0;
  std::string where{};
};

inline WorstOf worst_of(const Answer& answer, const Expected& e) {
  WorstOf worst;
  const auto note = [&](double got, double want, double budget, const char* what, index_t token, index_t head, index_t d) {
    const double budgets = in_budgets(got, want, budget);
    if (!(budgets > worst.budgets)) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s[token %td, head %td, dim %td] = %.9g, expected %.9g +- %.3g, %.3g budgets off",
                  what, token, head, d, got, want, budget, budgets);
    worst = {budgets, text};
  };
  const Tokens& out = answer.out;
  for (index_t token = 0; token < out.tokens; ++token) {
    for (index_t h = 0; h < out.heads; ++h) {
      const auto n = at(h * out.tokens + token);
      for (index_t d = 0; d < out.dim; ++d) {
        const double want = e.out[n * at(out.dim) + at(d)], error = e.out_error[n * at(out.dim) + at(d)];
        note(out.value(token * out.heads + h, d), want, stored_budget(out.format, want, error), "out", token, h, d);
      }
      note(double{answer.lse[n]}, e.lse[n], e.lse_error[n], "lse", token, h, 0);
    }
  }
  return worst;
}

}   // namespace test
