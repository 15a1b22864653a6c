// SPDX-License-Identifier: Apache-2.0
#include "fovea/cache/paged_cache.hpp"

#include <algorithm>
#include <memory>

#include "cache_rows.hpp"
#include "catch_compat.hpp"
#include "support/random.hpp"

using namespace test;
using fovea::CacheRows;
using fovea::Code;
using fovea::Format;
using fovea::KvBatch;
using fovea::KvLayout;
using fovea::PagedCache;
using fovea::PagedCacheShape;
using fovea::PageLists;
using fovea::Status;

namespace {

// Everything a refused call must not change. The order in which free pages are given out is not visible here, but in what
// comes later.
std::string everything(const PagedCache& cache) {
  const KvBatch batch = cache.batch();
  std::string all = all_rows(batch.kv, cache.rows());
  append_number(all, cache.free_pages());
  for (index_t page = 0; page < cache.pages(); ++page) append_number(all, cache.references(page));
  for (index_t sequence = 0; sequence < cache.sequences(); ++sequence) {
    append_number(all, cache.is_alive(sequence));
    append_number(all, cache.lengths()[static_cast<std::size_t>(sequence)]);
    for (index_t n = 0; n < batch.kv.block_table.extent[1]; ++n) append_number(all, batch.kv.block_table(sequence, n));
    if (!cache.is_alive(sequence)) continue;
    append_number(all, cache.next_position(sequence));
    for (index_t n = 0; n < cache.len(sequence); ++n) append_number(all, cache.position(sequence, n));
  }
  return all;
}

// The model: sequences are vectors of tokens, and pages are shared pointers, so that their use counts are the references.
struct Token {
  std::uint64_t id;
  index_t position;
};
struct Sequence {
  bool alive = false;
  std::vector<Token> tokens;
  std::vector<std::shared_ptr<int>> pages;
  index_t next_position = 0;
};

class Model {
 public:
  Model(index_t pages, index_t page_size, index_t sequences, index_t width)
      : page_size_(page_size), width_(width), free_(pages), all_(static_cast<std::size_t>(sequences)) {}

  index_t free_pages() const { return free_; }
  std::vector<Sequence>& all() { return all_; }
  Sequence* find(index_t sequence) {
    if (sequence < 0 || sequence >= static_cast<index_t>(all_.size())) return nullptr;
    Sequence& found = all_[static_cast<std::size_t>(sequence)];
    return found.alive ? &found : nullptr;
  }
  index_t unused() const {
    for (std::size_t n = 0; n < all_.size(); ++n) {
      if (!all_[n].alive) return static_cast<index_t>(n);
    }
    return -1;
  }
  static index_t len(const Sequence& sequence) { return static_cast<index_t>(sequence.tokens.size()); }

  index_t pages_needed(const Sequence& sequence, index_t count) const {
    if (count == 0) return 0;
    const index_t used = static_cast<index_t>(sequence.pages.size());
    const bool copy = len(sequence) % page_size_ != 0 && sequence.pages.back().use_count() > 1;
    return (len(sequence) + count + page_size_ - 1) / page_size_ - used + (copy ? 1 : 0);
  }
  bool may_append(const Sequence& sequence, index_t count) const {
    return count >= 0 && len(sequence) + count <= width_ * page_size_ && pages_needed(sequence, count) <= free_;
  }
  void append(Sequence& sequence, const std::vector<std::uint64_t>& ids) {
    if (!ids.empty() && len(sequence) % page_size_ != 0 && sequence.pages.back().use_count() > 1) {
      sequence.pages.back() = new_page();
    }
    for (const std::uint64_t id : ids) {
      if (len(sequence) % page_size_ == 0) sequence.pages.push_back(new_page());
      sequence.tokens.push_back({id, sequence.next_position++});
    }
  }
  void truncate(Sequence& sequence, index_t count) {
    if (count == 0) return;
    const index_t kept = len(sequence) - count;
    sequence.next_position = sequence.tokens[static_cast<std::size_t>(kept)].position;
    sequence.tokens.resize(static_cast<std::size_t>(kept));
    sequence.pages.resize(static_cast<std::size_t>((kept + page_size_ - 1) / page_size_));
  }
  void evict(Sequence& sequence, index_t begin, index_t count) {
    sequence.tokens.erase(sequence.tokens.begin() + begin, sequence.tokens.begin() + begin + count);
    sequence.pages.erase(sequence.pages.begin() + begin / page_size_, sequence.pages.begin() + (begin + count) / page_size_);
  }
  // A prefix shares like a fork that is cut back, except that its last page, if only partly wanted, is its own.
  void prefix(const Sequence& sequence, index_t count, Sequence& child) {
    child = sequence;
    truncate(child, len(child) - count);
    if (count % page_size_ != 0) child.pages.back() = new_page();
  }

 private:
  std::shared_ptr<int> new_page() {
    --free_;
    return std::shared_ptr<int>(new int(0), [this](int* page) {
      delete page;
      ++free_;
    });
  }

  index_t page_size_, width_, free_;
  std::vector<Sequence> all_;
};

void require_equal(PagedCache& cache, Model& model, Random& random) {
  const Status sound = cache.check();
  INFO(sound.message());
  REQUIRE(sound.ok());
  REQUIRE(cache.free_pages() == model.free_pages());
  const KvBatch batch = cache.batch();
  std::vector<index_t> wanted;
  for (index_t b = 0; b < cache.sequences(); ++b) {
    const Sequence& expected = model.all()[static_cast<std::size_t>(b)];
    REQUIRE(cache.is_alive(b) == expected.alive);
    REQUIRE(batch.len_k[static_cast<std::size_t>(b)] == Model::len(expected));
    if (!expected.alive) continue;
    REQUIRE(cache.next_position(b) == expected.next_position);
    for (index_t n = 0; n < Model::len(expected); ++n) {
      const Token& token = expected.tokens[static_cast<std::size_t>(n)];
      if (!holds(batch.kv, b, n, token.id, cache.rows()))
        FAIL("sequence " << b << ": key " << n << " is not token " << token.id);
      if (cache.position(b, n) != token.position)
        FAIL("sequence " << b << ": token " << n << " stood at " << token.position);
    }
    for (std::size_t n = 0; n < expected.pages.size(); ++n) {
      REQUIRE(cache.references(cache.pages_of(b)[n]) == expected.pages[n].use_count());
    }
    if (random.one_in(2)) wanted.push_back(b);
    if (random.one_in(4)) wanted.insert(wanted.begin(), b);
  }
  if (static_cast<index_t>(wanted.size()) > cache.sequences()) wanted.resize(static_cast<std::size_t>(cache.sequences()));
  KvBatch lists;
  REQUIRE(cache.csr(wanted, &lists).ok());
  REQUIRE(lists.len_k.size() == wanted.size());
  REQUIRE(lists.kv.page_begin.size() == wanted.size() + 1);
  REQUIRE(lists.kv.page_indices.size() == static_cast<std::size_t>(lists.kv.page_begin[wanted.size()]));
  // The same behind what all of them have at least, in memory of the caller's: both are good at the same time.
  index_t skip = wanted.empty() ? 0 : PTRDIFF_MAX;
  for (const index_t sequence : wanted) skip = std::min(skip, cache.len(sequence) / cache.page_size() * cache.page_size());
  PageLists own;
  KvBatch behind;
  REQUIRE(cache.csr(wanted, skip, own, &behind).ok());
  REQUIRE(behind.len_k.size() == wanted.size());
  REQUIRE(behind.kv.page_begin.size() == wanted.size() + 1);
  REQUIRE(behind.kv.page_indices.size() == static_cast<std::size_t>(behind.kv.page_begin[wanted.size()]));
  for (std::size_t b = 0; b < wanted.size(); ++b) {
    const Sequence& expected = model.all()[static_cast<std::size_t>(wanted[b])];
    REQUIRE(behind.len_k[b] == Model::len(expected) - skip);
    for (index_t n = 0; n < behind.len_k[b]; ++n) {
      if (!holds(behind.kv, static_cast<index_t>(b), n, expected.tokens[static_cast<std::size_t>(skip + n)].id, cache.rows()))
        FAIL("list " << b << " behind " << skip << ": key " << n << " is another token");
    }
  }
  for (std::size_t b = 0; b < wanted.size(); ++b) {
    const Sequence& expected = model.all()[static_cast<std::size_t>(wanted[b])];
    REQUIRE(lists.len_k[b] == Model::len(expected));
    for (index_t n = 0; n < lists.len_k[b]; ++n) {
      if (!holds(lists.kv, static_cast<index_t>(b), n, expected.tokens[static_cast<std::size_t>(n)].id, cache.rows())) {
        FAIL("list " << b << ": key " << n << " is another token");
      }
    }
  }
}

struct Seen {
  int done = 0, refused = 0, no_page = 0, copied = 0, evicted = 0;
};

Seen random_operations(const PagedCacheShape& shape, int operations, std::uint64_t seed) {
  PagedCache cache;
  REQUIRE(cache.create(shape).ok());
  const CacheRows rows = cache.rows();
  CHECK(cache.batch().kv.k.stride[2] ==
        k_bytes(rows) * (shape.layout == KvLayout::token_major ? rows.kv_heads : 1));
  const index_t page_size = shape.page_size;
  const index_t width = shape.longest == 0 ? shape.pages : (shape.longest + page_size - 1) / page_size;
  Model model(shape.pages, page_size, shape.sequences, width);
  Random random(seed);
  std::uint64_t next_id = 1;
  Seen seen;
  for (int operation = 0; operation < operations; ++operation) {
    CAPTURE(operation);
    const index_t sequence = random.one_in(30) ? random.between(-2, shape.sequences) : random.below(shape.sequences);
    Sequence* const mine = model.find(sequence);
    const index_t len = mine == nullptr ? 0 : Model::len(*mine);
    const bool verify = random.one_in(50);
    // Out of pages is compared always: it is the refusal an engine lives with.
    const std::string before = verify || cache.free_pages() < 2 ? everything(cache) : std::string();
    index_t made = -7;
    bool expected = false;
    Status status;
    // A full pool is emptied soon, or most of the walk would be refusals.
    const index_t what = cache.free_pages() == 0 && random.one_in(3) ? random.pick<index_t>({2, 6, 9}) : random.below(20);
    switch (what) {
      case 0:
      case 1: {
        const index_t unused = model.unused();
        expected = unused >= 0;
        status = cache.create_sequence(&made);
        if (expected) model.all()[static_cast<std::size_t>(unused)].alive = true;
        REQUIRE(made == (expected ? unused : -7));
        break;
      }
      case 2:
        expected = mine != nullptr;
        status = cache.destroy(sequence);
        if (expected) *mine = Sequence();
        break;
      case 3:
      case 4:
      case 5: {
        const index_t unused = model.unused();
        const index_t count = random.one_in(15) ? len + random.between(-1, 1) : random.between(0, len);
        const bool whole = what == 3;
        expected = mine != nullptr && unused >= 0 &&
                   (whole || (count >= 0 && count <= len && (count % page_size == 0 || model.free_pages() > 0)));
        status = whole ? cache.fork(sequence, &made) : cache.share_prefix(sequence, count, &made);
        if (expected && whole) model.all()[static_cast<std::size_t>(unused)] = *mine;
        if (expected && !whole) model.prefix(*mine, count, model.all()[static_cast<std::size_t>(unused)]);
        REQUIRE(made == (expected ? unused : -7));
        break;
      }
      case 6:
      case 7: {
        const index_t count = random.one_in(15) ? len + random.between(-len, 2) - 1 : random.below(len / 2 + 1);
        expected = mine != nullptr && count >= 0 && count <= len;
        status = cache.truncate(sequence, count);
        if (expected) model.truncate(*mine, count);
        break;
      }
      case 8: {
        const index_t unit = random.one_in(5) ? 1 : page_size;
        const index_t begin = random.between(0, len / unit) * unit,
                      count = random.between(0, (len - begin) / unit + 1) * unit;
        expected = mine != nullptr && begin % page_size == 0 && count % page_size == 0 && begin + count <= len;
        status = cache.evict(sequence, begin, count);
        if (expected) model.evict(*mine, begin, count);
        if (expected && count > 0) ++seen.evicted;
        break;
      }
      case 9: {
        const index_t recent = random.between(0, len + 2), sinks = random.between(0, len + 2);
        expected = mine != nullptr;
        index_t evicted = -7, count = 0;
        status = cache.keep_recent(sequence, recent, sinks, &evicted);
        if (!expected) break;
        // Page by page: one may go if all of its tokens lie between the sinks and the recent ones.
        index_t first = -1;
        for (index_t begin = 0; begin + page_size <= len - recent; begin += page_size) {
          if (begin < sinks) continue;
          if (first < 0) first = begin;
          count += page_size;
        }
        REQUIRE(evicted == count);
        if (count > 0) model.evict(*mine, first, count);
        if (count > 0) ++seen.evicted;
        break;
      }
      default: {
        const index_t count =
            random.one_in(20) ? random.between(-1, 3 * page_size * shape.pages / 2) : random.below(2 * page_size);
        std::vector<std::uint64_t> ids;
        for (index_t n = 0; n < count; ++n) ids.push_back(next_id++);
        expected = mine != nullptr && model.may_append(*mine, count);
        const index_t needed = mine != nullptr && count >= 0 ? cache.pages_needed(sequence, count) : 0;
        if (mine != nullptr && count >= 0) REQUIRE(needed == model.pages_needed(*mine, count));
        if (expected && count > 0 && len % page_size != 0 && mine->pages.back().use_count() > 1) ++seen.copied;
        if (what < 14) {
          status = cache.append(sequence, count, WriteTokens{ids, rows});
        } else if (what < 18) {
          const ReadyRows ready(ids, rows);
          status = cache.append(sequence, count, ready.k, ready.v);
        } else {
          status = cache.extend(sequence, count);
          for (index_t n = 0; status.ok() && n < count; ++n) {
            for (index_t kv_head = 0; kv_head < rows.kv_heads; ++kv_head) {
              WriteTokens{ids, rows}(n, kv_head, cache.writable_k_row(sequence, kv_head, len + n),
                                     cache.writable_v_row(sequence, kv_head, len + n));
            }
          }
        }
        if (expected) model.append(*mine, ids);
        break;
      }
    }
    INFO(status.message());
    if (status.ok() != expected) FAIL("refused or not, against the model");
    ++(expected ? seen.done : seen.refused);
    if (status.code() == Code::out_of_pages) ++seen.no_page;
    if (!expected && !before.empty() && everything(cache) != before) FAIL("a refused call changed the cache");
    if (cache.free_pages() != model.free_pages())
      FAIL("free pages " << cache.free_pages() << ", not " << model.free_pages());
    if (verify) require_equal(cache, model, random);
  }
  require_equal(cache, model, random);
  for (index_t sequence = 0; sequence < shape.sequences; ++sequence) {
    if (cache.is_alive(sequence)) REQUIRE(cache.destroy(sequence).ok());
  }
  REQUIRE(cache.check().ok());
  REQUIRE(cache.free_pages() == shape.pages);
  model.all().clear();
  return seen;
}

PagedCache made(const PagedCacheShape& shape) {
  PagedCache cache;
  REQUIRE(cache.create(shape).ok());
  return cache;
}

}   // namespace

TEST_CASE("PagedCache does what vectors of tokens do, 130000 random operations", "[cache]") {
  const std::vector<float> scale(2 * 9, 1.f);
  Seen all;
  const auto run = [&](const PagedCacheShape& shape, int operations, std::uint64_t seed) {
    const Seen seen = random_operations(shape, operations, seed);
    all.done += seen.done;
    all.refused += seen.refused;
    all.no_page += seen.no_page;
    all.copied += seen.copied;
    all.evicted += seen.evicted;
  };
  run({.rows = {.kv_heads = 2, .dim_qk = 8, .dim_v = 5}, .pages = 40, .page_size = 4, .sequences = 12, .poison = true},
      40000, 1);
  run({.rows = {.dim_qk = 6, .dim_v = 6}, .pages = 60, .page_size = 1, .sequences = 9, .longest = 30, .poison = true}, 20000,
      2);
  run({.rows = {.kv_heads = 3, .dim_qk = 33, .dim_v = 40, .k = Format::i4_g32_zero, .v = Format::e4m3},
       .pages = 30,
       .page_size = 16,
       .sequences = 10,
       .layout = KvLayout::token_major,
       .poison = true},
      20000, 3);
  run({.rows = {.dim_qk = 12, .dim_v = 8, .v_in_k = true},
       .pages = 25,
       .page_size = 3,
       .sequences = 20,
       .longest = 31,
       .poison = true},
      20000, 4);
  run({.rows = {.kv_heads = 2,
                .dim_qk = 9,
                .dim_v = 9,
                .k = Format::i8_channel,
                .v = Format::i8_token,
                .k_channel_scale = scale.data()},
       .pages = 7,
       .page_size = 7,
       .sequences = 6},
      20000, 5);
  run({.rows = {.dim_qk = 4, .dim_v = 4}, .pages = 6, .page_size = 256, .sequences = 5, .poison = true}, 10000, 6);
  // The walk must have been everywhere.
  CHECK(all.done > 70000);
  CHECK(all.refused > 10000);
  CHECK(all.no_page > 5000);
  CHECK(all.copied > 500);
  CHECK(all.evicted > 1000);
}

TEST_CASE("PagedCache: a fork copies the partly filled page once, whoever appends first", "[cache]") {
  const CacheRows rows{.kv_heads = 2, .dim_qk = 4, .dim_v = 4};
  for (const bool parent_first : {true, false}) {
    CAPTURE(parent_first);
    PagedCache cache = made({.rows = rows, .pages = 8, .page_size = 4, .sequences = 3, .poison = true});
    index_t parent = -1, child = -1;
    REQUIRE(cache.create_sequence(&parent).ok());
    REQUIRE(cache.append(parent, 6, WriteTokens{{0, 1, 2, 3, 4, 5}, rows}).ok());
    REQUIRE(cache.fork(parent, &child).ok());
    CHECK(cache.free_pages() == 6);
    CHECK(cache.references(cache.pages_of(parent)[1]) == 2);
    const index_t first = parent_first ? parent : child, second = parent_first ? child : parent;
    const std::int32_t page = cache.pages_of(first)[1];
    REQUIRE(cache.append(first, 1, WriteTokens{{10}, rows}).ok());
    CHECK(cache.pages_of(first)[1] != page);
    CHECK(cache.free_pages() == 5);
    REQUIRE(cache.append(second, 1, WriteTokens{{20}, rows}).ok());
    CHECK(cache.pages_of(second)[1] == page);
    CHECK(cache.free_pages() == 5);
    CHECK(cache.pages_of(first)[0] == cache.pages_of(second)[0]);
    const fovea::Kv kv = cache.batch().kv;
    for (index_t n = 0; n < 6; ++n) {
      CHECK(holds(kv, first, n, static_cast<std::uint64_t>(n), rows));
      CHECK(holds(kv, second, n, static_cast<std::uint64_t>(n), rows));
    }
    CHECK(holds(kv, first, 6, 10, rows));
    CHECK(holds(kv, second, 6, 20, rows));
    CHECK(cache.check().ok());
  }
}

TEST_CASE("PagedCache: a shared prefix shares full pages and copies the rest", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  PagedCache cache = made({.rows = rows, .pages = 6, .page_size = 4, .sequences = 4});
  index_t parent = -1, child = -1, other = -1;
  REQUIRE(cache.create_sequence(&parent).ok());
  REQUIRE(cache.append(parent, 11, WriteTokens{{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, rows}).ok());
  REQUIRE(cache.share_prefix(parent, 8, &child).ok());
  CHECK(cache.free_pages() == 3);
  REQUIRE(cache.share_prefix(parent, 9, &other).ok());
  CHECK(cache.free_pages() == 2);
  CHECK(cache.pages_of(other)[2] != cache.pages_of(parent)[2]);
  CHECK(cache.references(cache.pages_of(parent)[0]) == 3);
  CHECK(cache.references(cache.pages_of(parent)[2]) == 1);
  CHECK(cache.next_position(child) == 8);
  CHECK(cache.next_position(other) == 9);
  REQUIRE(cache.append(other, 3, WriteTokens{{90, 91, 92}, rows}).ok());
  CHECK(cache.free_pages() == 2);
  CHECK(holds(cache.batch().kv, other, 8, 8, rows));
  CHECK(holds(cache.batch().kv, other, 9, 90, rows));
  CHECK(holds(cache.batch().kv, parent, 9, 9, rows));
  REQUIRE(cache.destroy(parent).ok());
  CHECK(holds(cache.batch().kv, child, 7, 7, rows));
  CHECK(cache.free_pages() == 3);
  CHECK(cache.check().ok());
}

TEST_CASE("PagedCache: positions count the tokens that were evicted", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  PagedCache cache = made({.rows = rows, .pages = 8, .page_size = 4, .sequences = 2});
  index_t sequence = -1;
  REQUIRE(cache.create_sequence(&sequence).ok());
  std::vector<std::uint64_t> ids(22);
  for (std::size_t n = 0; n < ids.size(); ++n) ids[n] = n;
  REQUIRE(cache.append(sequence, 22, WriteTokens{ids, rows}).ok());

  index_t evicted = -1;
  REQUIRE(cache.keep_recent(sequence, 7, 2, &evicted).ok());
  // Pages hold tokens 0-3, 4-7, 8-11, 12-15, 16-19, 20-21; the first has sinks, token 15 is recent.
  CHECK(evicted == 8);
  CHECK(cache.len(sequence) == 14);
  CHECK(cache.position(sequence, 3) == 3);
  CHECK(cache.position(sequence, 4) == 12);
  CHECK(cache.next_position(sequence) == 22);
  CHECK(holds(cache.batch().kv, sequence, 4, 12, rows));
  CHECK(cache.free_pages() == 4);

  REQUIRE(cache.truncate(sequence, 10).ok());
  CHECK(cache.next_position(sequence) == 12);
  REQUIRE(cache.truncate(sequence, 1).ok());
  CHECK(cache.next_position(sequence) == 3);

  // A sequence whose last full page was evicted goes on where it stood.
  REQUIRE(cache.append(sequence, 5, WriteTokens{ids, rows}).ok());
  REQUIRE(cache.evict(sequence, 4, 4).ok());
  CHECK(cache.len(sequence) == 4);
  CHECK(cache.next_position(sequence) == 8);
  REQUIRE(cache.append(sequence, 1, WriteTokens{ids, rows}).ok());
  CHECK(cache.position(sequence, 4) == 8);
  REQUIRE(cache.evict(sequence, 0, 4).ok());
  CHECK(cache.position(sequence, 0) == 8);
  CHECK(cache.check().ok());
}

TEST_CASE("PagedCache refuses with the numbers and stays as it was", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  PagedCache cache;
  index_t made_sequence = -7;
  CHECK(cache.create_sequence(&made_sequence).code() == Code::out_of_pages);
  CHECK(cache.check().ok());
  REQUIRE(cache.create({.rows = rows, .pages = 4, .page_size = 4, .sequences = 3, .longest = 12, .poison = true}).ok());
  REQUIRE(cache.create_sequence(&made_sequence).ok());
  REQUIRE(cache.append(0, 6, WriteTokens{{1, 2, 3, 4, 5, 6}, rows}).ok());
  REQUIRE(cache.fork(0, &made_sequence).ok());
  CHECK(made_sequence == 1);
  REQUIRE(cache.create_sequence(&made_sequence).ok());
  REQUIRE(cache.append(2, 5, WriteTokens{{1, 2, 3, 4, 5}, rows}).ok());
  const std::string before = everything(cache);
  KvBatch lists;
  const index_t four[] = {0, 1, 2, 0};
  const index_t unknown[] = {0, 3};

  const auto refused = [&](const Status& status, Code code, const char* words) {
    CHECK(status.code() == code);
    CHECK_THAT(status.message(), Catch::Matchers::ContainsSubstring(words));
    CHECK(everything(cache) == before);
    CHECK(made_sequence == 2);
  };
  refused(cache.append(0, 1, WriteTokens{{7}, rows}), Code::out_of_pages, "1 tokens for sequence 0 need 1 pages, 0 of 4");
  refused(cache.extend(2, 8), Code::out_of_pages, "has 5 and may have 7 more");
  refused(cache.extend(2, PTRDIFF_MAX), Code::out_of_pages, "9223372036854775807 tokens");
  refused(cache.extend(3, 1), Code::invalid_argument, "sequence 3 of 3");
  refused(cache.extend(2, -1), Code::invalid_argument, "-1 tokens");
  refused(cache.create_sequence(&made_sequence), Code::out_of_pages, "all 3 sequences");
  refused(cache.fork(0, &made_sequence), Code::out_of_pages, "all 3 sequences");
  refused(cache.truncate(0, 7), Code::invalid_argument, "has 6");
  refused(cache.evict(0, 0, 3), Code::invalid_argument, "pages of 4");
  refused(cache.evict(0, 4, 4), Code::invalid_argument, "tokens 4 + 4");
  refused(cache.evict(0, -4, 4), Code::invalid_argument, "-4");
  refused(cache.share_prefix(0, 7, &made_sequence), Code::invalid_argument, "has 6");
  refused(cache.csr(four, &lists), Code::invalid_argument, "4 sequences");
  refused(cache.csr(unknown, &lists), Code::invalid_argument, "sequence 3 of 3");
  PageLists own;
  const index_t two[] = {0, 2};
  refused(cache.csr(two, 5, own, &lists), Code::invalid_argument, "first 5 tokens, pages are of 4");
  refused(cache.csr(two, -4, own, &lists), Code::invalid_argument, "first -4 tokens");
  refused(cache.csr(two, 8, own, &lists), Code::invalid_argument, "first 8 tokens, sequence 0 has 6");
  refused(cache.csr(four, 4, own, &lists), Code::invalid_argument, "4 sequences");
  refused(cache.csr(unknown, 4, own, &lists), Code::invalid_argument, "sequence 3 of 3");
  PagedCache not_created;
  refused(not_created.csr({}, &lists), Code::invalid_argument, "was not created");
  refused(not_created.csr({}, 0, own, &lists), Code::invalid_argument, "was not created");
  CHECK(lists.kv.page_indices.data() == nullptr);
  refused(cache.create({.rows = rows, .pages = 4, .page_size = 257}), Code::invalid_argument, "257 slots");
  refused(cache.create({.rows = rows, .pages = 0}), Code::invalid_argument, "0 pages");
  refused(cache.create({.rows = rows, .pages = 0x7fffffff, .page_size = 256, .sequences = 0x7fffffff}), Code::out_of_memory,
          "too much");

  REQUIRE(cache.destroy(1).ok());
  CHECK(cache.extend(1, 0).code() == Code::invalid_argument);
  CHECK_THAT(cache.extend(1, 0).message(), Catch::Matchers::ContainsSubstring("does not exist"));
  CHECK(cache.append(0, 1, WriteTokens{{7}, rows}).ok());   // alone on its page now
  CHECK(cache.share_prefix(0, 2, &made_sequence).code() == Code::out_of_pages);
  CHECK(cache.share_prefix(0, 4, &made_sequence).ok());
}

TEST_CASE("PagedCache: slots that were never written are poison, and so are pages that were given back", "[cache]") {
  const CacheRows rows{.kv_heads = 2, .dim_qk = 4, .dim_v = 4};
  PagedCache cache = made({.rows = rows, .pages = 2, .page_size = 4, .poison = true});
  index_t sequence = -1;
  REQUIRE(cache.create_sequence(&sequence).ok());
  const auto poisoned = [&](index_t token) {
    const std::vector<std::byte> row(8, std::byte{0xff});
    return std::memcmp(cache.k_row(sequence, 1, token), row.data(), 8) == 0 &&
           std::memcmp(cache.v_row(sequence, 1, token), row.data(), 8) == 0;
  };
  REQUIRE(cache.append(sequence, 7, WriteTokens{{1, 2, 3, 4, 5, 6, 7}, rows}).ok());
  CHECK_FALSE(poisoned(6));
  REQUIRE(cache.truncate(sequence, 5).ok());
  REQUIRE(cache.extend(sequence, 6).ok());
  CHECK_FALSE(poisoned(1));
  for (index_t token = 2; token < 8; ++token) CHECK(poisoned(token));
}

TEST_CASE("PagedCache: check() finds a page that is listed wrongly, and a free one that was written", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  PagedCache cache = made({.rows = rows, .pages = 5, .page_size = 2, .sequences = 2, .poison = true});
  index_t first = -1, second = -1;
  REQUIRE(cache.create_sequence(&first).ok());
  REQUIRE(cache.create_sequence(&second).ok());
  REQUIRE(cache.append(first, 4, WriteTokens{{1, 2, 3, 4}, rows}).ok());
  REQUIRE(cache.append(second, 2, WriteTokens{{5, 6}, rows}).ok());
  REQUIRE(cache.check().ok());
  const fovea::Kv kv = cache.batch().kv;
  auto* const table = const_cast<std::int32_t*>(kv.block_table.data);
  const auto broken = [&](index_t entry, std::int32_t page, const char* words) {
    const std::int32_t was = std::exchange(table[entry], page);
    CHECK_THAT(cache.check().message(), Catch::Matchers::ContainsSubstring(words));
    table[entry] = was;
    CHECK(cache.check().ok());
  };
  const index_t second_row = kv.block_table.stride[0];
  broken(1, table[0], "twice");
  broken(1, table[second_row], "references");
  broken(1, 4, "free page 4");
  broken(1, -1, "entry 1");
  broken(1, 5, "entry 1");
  broken(2, 3, "entry 2");
  auto* const free_row = const_cast<std::byte*>(kv.v.data + 4 * kv.v.stride[0]);
  *free_row = std::byte{0};
  CHECK_THAT(cache.check().message(), Catch::Matchers::ContainsSubstring("free page 4 was written"));
}

TEST_CASE("PagedCache moves, and what is left is an empty cache", "[cache]") {
  const CacheRows rows{.dim_qk = 4, .dim_v = 4};
  PagedCache first = made({.rows = rows, .pages = 3});
  index_t sequence = -1;
  REQUIRE(first.create_sequence(&sequence).ok());
  REQUIRE(first.append(sequence, 1, WriteTokens{{9}, rows}).ok());
  const KvBatch batch = first.batch();
  PagedCache second = made({.rows = rows, .pages = 1});
  second = std::move(first);
  CHECK(first.sequences() == 0);
  CHECK(first.free_pages() == 0);
  CHECK(first.destroy(sequence).code() == Code::invalid_argument);
  CHECK(holds(batch.kv, sequence, 0, 9, rows));
  CHECK(second.destroy(sequence).ok());
  CHECK(second.free_pages() == 3);
}
