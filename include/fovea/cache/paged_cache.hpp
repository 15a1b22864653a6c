// SPDX-License-Identifier: Apache-2.0
// PagedCache: a pool of pages of 1 to 256 slots. A sequence is a list of pages, pages are shared by reference count, and a
// page that somebody else reads is copied before it is written. One writer at a time; no call throws, and a refused one
// changes nothing: an append that lacks one page appends no token.
#pragma once
#include "rows.hpp"

namespace fovea {
inline namespace v0 {

struct PagedCacheShape {
  CacheRows rows;
  index_t pages = 0, page_size = 16;
  index_t sequences = 1;   // how many may exist at the same time
  index_t longest = 0;     // tokens of one sequence at most; 0 = the whole pool
  KvLayout layout = KvLayout::head_major;
  bool poison = false;   // 0xFF in every free page and unwritten slot; writes all memory once at creation
};

inline namespace FOVEA_ARCH {

// Memory for CSR lists beside a cache's own: two levels of a cascade are read at the same time. PagedCache::csr fills it.
class PageLists {
 private:
  friend class PagedCache;
  struct State {
    index_t sequences = 0, pages = 0;   // room
    std::int32_t* page = nullptr;       // [pages]
    index_t *begin = nullptr, *len = nullptr;

    void take(Bump& bump, index_t room_sequences, index_t room_pages) {
      sequences = room_sequences;
      pages = room_pages;
      page = bump.take<std::int32_t>(pages);
      begin = bump.take<index_t>(sequences + 1);
      len = bump.take<index_t>(sequences);
    }
  };

  Status reserve(index_t sequences, index_t pages) {
    if (owned_.state.begin != nullptr && owned_.state.sequences >= sequences && owned_.state.pages >= pages) return {};
    return allocate(owned_, [&](Bump& bump, State& state) { state.take(bump, sequences, pages); });
  }

  Owned<State> owned_;
};

class PagedCache {
 public:
  // Replaces whatever the cache held; on error it keeps it. The tables take 12 bytes per sequence and page of `longest`.
  Status create(const PagedCacheShape& shape) {
    if (Status status = check_rows(shape.rows); !status.ok()) return status;
    constexpr index_t kMostPages = 0x7fffffff;   // pages are int32 in the tables
    if (shape.page_size < 1 || shape.page_size > 256 || shape.pages < 1 || shape.pages > kMostPages || shape.sequences < 1 ||
        shape.sequences > kMostPages || shape.longest < 0) {
      return Status::error(Code::invalid_argument,
                           "cache: %td pages (1 to %td) of %td slots (1 to 256), %td sequences (from 1), at most %td tokens",
                           shape.pages, kMostPages, shape.page_size, shape.sequences, shape.longest);
    }
    const index_t wanted = shape.longest / shape.page_size + (shape.longest % shape.page_size != 0);
    const index_t width = shape.longest == 0 ? shape.pages : std::min(wanted, shape.pages);
    if (limited_product({shape.pages, shape.page_size, token_bytes(shape.rows)}) == kLargestCache ||
        limited_product({shape.sequences, width, 16}) == kLargestCache) {
      return Status::error(Code::out_of_memory,
                           "cache: %td pages of %td slots of %td bytes and %td sequences of %td pages are too much",
                           shape.pages, shape.page_size, token_bytes(shape.rows), shape.sequences, width);
    }
    const auto take = [&](Bump& bump, State& state) {
      state.pages = shape.pages;
      state.page_size = shape.page_size;
      state.sequences = shape.sequences;
      state.width = width;
      state.store = RowStore(bump, shape.rows, shape.pages, shape.page_size, shape.layout, shape.poison);
      state.table = bump.take<std::int32_t>(shape.sequences * width);
      state.first_position = bump.take<std::int32_t>(shape.sequences * width);
      state.csr.take(bump, shape.sequences, shape.sequences * width);
      state.len = bump.take<index_t>(shape.sequences);
      state.next_position = bump.take<index_t>(shape.sequences);
      state.alive = bump.take<bool>(shape.sequences);
      state.references = bump.take<std::int32_t>(shape.pages);
      state.recounted = bump.take<std::int32_t>(shape.pages);
      state.last_reader = bump.take<std::int32_t>(shape.pages);
      state.free_pages = bump.take<std::int32_t>(shape.pages);
    };
    if (Status status = allocate(owned_, take); !status.ok()) return status;
    State& now = owned_.state;
    std::fill_n(now.table, now.sequences * width, kNoPage);
    std::fill_n(now.len, now.sequences, index_t{0});
    std::fill_n(now.next_position, now.sequences, index_t{0});
    std::fill_n(now.alive, now.sequences, false);
    std::fill_n(now.references, now.pages, 0);
    // The stack gives page 0 first.
    for (index_t page = 0; page < now.pages; ++page) now.free_pages[page] = static_cast<std::int32_t>(now.pages - 1 - page);
    now.free_count = now.pages;
    return {};
  }

  // An empty sequence; its number is the lowest that is unused, and its row in the block table.
  Status create_sequence(index_t* sequence) {
    const index_t found = unused_sequence();
    if (found < 0) return no_sequence();
    state().alive[found] = true;
    *sequence = found;
    return {};
  }

  Status destroy(index_t sequence) {
    if (Status status = check_alive(sequence); !status.ok()) return status;
    drop_pages(sequence, 0, pages_of(sequence).size());
    state().len[sequence] = 0;
    state().next_position[sequence] = 0;
    state().alive[sequence] = false;
    return {};
  }

  // Appends `count` tokens and calls write(token, kv_head, k_row, v_row) for each row of them.
  template <RowWriter Write>
  Status append(index_t sequence, index_t count, Write&& write) {
    const index_t first = is_alive(sequence) ? state().len[sequence] : 0;
    if (Status status = extend(sequence, count); !status.ok()) return status;
    for (index_t token = 0; token < count;) {
      const index_t page = state().table[entry(sequence, (first + token) / page_size())],
                    slot = (first + token) % page_size();
      const index_t run = std::min(count - token, page_size() - slot);
      each_token_and_head(run, rows().kv_heads, store().token_major() ? 1 : run, [&](index_t n, index_t kv_head) {
        write(token + n, kv_head, store().k(page, kv_head, slot + n), store().v(page, kv_head, slot + n));
      });
      token += run;
    }
    return {};
  }

  // Appends ready rows, strides per [-, kv_head, token]: from a tensor (dense_kv(k, v).k), stored_rows, another cache.
  Status append(index_t sequence, index_t count, const Stored& k, const Stored& v) {
    if (Status status = check_ready_rows(rows(), k, v, count); !status.ok()) return status;
    return append(sequence, count, copy_rows(rows(), k, v));
  }

  // Appends tokens whose rows the caller writes afterwards, through writable_k_row, from any number of threads.
  Status extend(index_t sequence, index_t count) {
    if (Status status = first_error({check_alive(sequence), check_count(count)}); !status.ok()) return status;
    if (count == 0) return {};
    State& now = state();
    const index_t len = now.len[sequence], room = now.width * page_size() - len;
    if (count > room) {
      return Status::error(Code::out_of_pages, "cache: %td tokens to append, sequence %td has %td and may have %td more",
                           count, sequence, len, room);
    }
    if (count > kLastPosition - now.next_position[sequence]) {
      return Status::error(Code::unsupported, "cache: %td tokens from position %td on; positions end at %td", count,
                           now.next_position[sequence], kLastPosition);
    }
    const index_t needed = pages_needed(sequence, count);
    if (needed > now.free_count) {
      return Status::error(Code::out_of_pages, "cache: %td tokens for sequence %td need %td pages, %td of %td are free",
                           count, sequence, needed, now.free_count, now.pages);
    }
    if (must_copy_last_page(sequence)) {
      std::int32_t& last = now.table[entry(sequence, len / page_size())];
      const std::int32_t own = take_page();
      store().copy(last, 0, own, 0, len % page_size());
      drop_page(last);
      last = own;
    }
    index_t& next = now.next_position[sequence];
    for (index_t position = len; position < len + count;) {
      if (position % page_size() == 0) {
        now.table[entry(sequence, position / page_size())] = take_page();
        now.first_position[entry(sequence, position / page_size())] = static_cast<std::int32_t>(next);
      }
      const index_t run = std::min(len + count - position, page_size() - position % page_size());
      position += run;
      next += run;
    }
    now.len[sequence] = len + count;
    return {};
  }

  // A new sequence with all tokens of `sequence`. It shares every page; whichever of the two appends first copies the last,
  // partly filled one. Takes no page.
  Status fork(index_t sequence, index_t* child) {
    if (Status status = check_alive(sequence); !status.ok()) return status;
    const index_t found = unused_sequence();
    if (found < 0) return no_sequence();
    share_pages(sequence, found, pages_of(sequence).size());
    state().len[found] = state().len[sequence];
    state().next_position[found] = state().next_position[sequence];
    *child = found;
    return {};
  }

  // A new sequence with the first `count` tokens of `sequence`, for requests with one beginning. Full pages are shared, a
  // page of which only a part is wanted is copied at once: the tokens behind it will differ, and no later append has to
  // copy.
  Status share_prefix(index_t sequence, index_t count, index_t* child) {
    if (Status status = first_error({check_alive(sequence), check_count(count)}); !status.ok()) return status;
    State& now = state();
    if (count > now.len[sequence]) {
      return Status::error(Code::invalid_argument, "cache: a prefix of %td tokens, sequence %td has %td", count, sequence,
                           now.len[sequence]);
    }
    const index_t found = unused_sequence();
    if (found < 0) return no_sequence();
    const index_t full = count / page_size(), part = count % page_size();
    if (part > 0 && now.free_count == 0) {
      return Status::error(Code::out_of_pages,
                           "cache: a prefix of %td tokens needs a page for its last %td, 0 of %td are free", count, part,
                           now.pages);
    }
    now.next_position[found] = count == now.len[sequence] ? now.next_position[sequence] : position(sequence, count);
    share_pages(sequence, found, static_cast<std::size_t>(full));
    if (part > 0) {
      const std::int32_t own = take_page();
      store().copy(now.table[entry(sequence, full)], 0, own, 0, part);
      now.table[entry(found, full)] = own;
      now.first_position[entry(found, full)] = now.first_position[entry(sequence, full)];
    }
    now.len[found] = count;
    *child = found;
    return {};
  }

  // Rolls back the last `count` tokens; pages that hold none of the others are given back.
  Status truncate(index_t sequence, index_t count) {
    if (Status status = first_error({check_alive(sequence), check_count(count)}); !status.ok()) return status;
    State& now = state();
    const index_t len = now.len[sequence] - count;
    if (len < 0) {
      return Status::error(Code::invalid_argument, "cache: %td tokens to roll back, sequence %td has %td", count, sequence,
                           now.len[sequence]);
    }
    if (count == 0) return {};
    now.next_position[sequence] = position(sequence, len);
    const std::size_t kept = static_cast<std::size_t>(pages_for(len));
    drop_pages(sequence, kept, pages_of(sequence).size());
    now.len[sequence] = len;
    if (const index_t part = len % page_size(); part > 0) {
      const std::int32_t last = now.table[entry(sequence, len / page_size())];
      if (now.references[last] == 1) store().poison(last, part, page_size() - part);
    }
    return {};
  }

  // Forgets the tokens [begin, begin + count): whole, full pages, so both are multiples of the page size. Later tokens move
  // up: token begin + count becomes token begin. Their rows do not change, and position() still says where they stood.
  Status evict(index_t sequence, index_t begin, index_t count) {
    if (Status status = first_error({check_alive(sequence), check_count(count), check_count(begin)}); !status.ok())
      return status;
    State& now = state();
    const index_t len = now.len[sequence];
    if (begin % page_size() != 0 || count % page_size() != 0 || begin > len || count > len - begin) {
      return Status::error(
          Code::invalid_argument,
          "cache: tokens %td + %td of sequence %td to evict; it has %td in pages of %td, which go as a whole", begin, count,
          sequence, len, page_size());
    }
    const index_t first = begin / page_size(), dropped = count / page_size(), pages = pages_for(len);
    for (index_t page = first; page < first + dropped; ++page) drop_page(now.table[entry(sequence, page)]);
    const auto close_gap = [&](std::int32_t* row) { std::copy(row + first + dropped, row + pages, row + first); };
    close_gap(now.table + entry(sequence, 0));
    close_gap(now.first_position + entry(sequence, 0));
    std::fill_n(now.table + entry(sequence, pages - dropped), dropped, kNoPage);
    now.len[sequence] = len - count;
    return {};
  }

  // Evicts every whole page between the first `sinks` tokens and the last `recent`; says how many tokens that were.
  Status keep_recent(index_t sequence, index_t recent, index_t sinks, index_t* evicted) {
    if (Status status = first_error({check_alive(sequence), check_count(recent), check_count(sinks)}); !status.ok())
      return status;
    const index_t len = state().len[sequence];
    const index_t begin = sinks >= len ? len : (sinks + page_size() - 1) / page_size() * page_size();
    const index_t end = recent >= len ? 0 : (len - recent) / page_size() * page_size();
    *evicted = std::max(end - begin, index_t{0});
    return *evicted == 0 ? Status() : evict(sequence, begin, *evicted);
  }

  // Free pages an append of `count` tokens takes.
  index_t pages_needed(index_t sequence, index_t count) const {
    FOVEA_ASSERT(is_alive(sequence) && count >= 0);
    const index_t len = state().len[sequence];
    const index_t more = count / page_size() + (len % page_size() + count % page_size() + page_size() - 1) / page_size() -
                         (len % page_size() != 0);
    return count == 0 ? 0 : more + (must_copy_last_page(sequence) ? 1 : 0);
  }

  index_t pages() const { return state().pages; }
  index_t free_pages() const { return state().free_count; }
  index_t page_size() const { return state().page_size; }
  index_t sequences() const { return state().sequences; }
  const CacheRows& rows() const { return store().rows(); }
  std::size_t bytes() const { return owned_.block.size(); }
  bool is_alive(index_t sequence) const { return sequence >= 0 && sequence < sequences() && state().alive[sequence]; }
  index_t references(index_t page) const {
    FOVEA_ASSERT(page >= 0 && page < pages());
    return state().references[page];
  }
  index_t len(index_t sequence) const {
    FOVEA_ASSERT(is_alive(sequence));
    return state().len[sequence];
  }
  // [sequence]; 0 where none lives.
  std::span<const index_t> lengths() const { return {state().len, static_cast<std::size_t>(sequences())}; }
  std::span<const std::int32_t> pages_of(index_t sequence) const {
    FOVEA_ASSERT(is_alive(sequence));
    return {state().table + entry(sequence, 0), static_cast<std::size_t>(pages_for(state().len[sequence]))};
  }

  // Where token `token` stood when it was appended, evicted tokens counted: what its key was rotated by.
  index_t position(index_t sequence, index_t token) const {
    FOVEA_ASSERT(is_alive(sequence) && token >= 0 && token < len(sequence));
    return state().first_position[entry(sequence, token / page_size())] + token % page_size();
  }
  // The position of the token that is appended next.
  index_t next_position(index_t sequence) const {
    FOVEA_ASSERT(is_alive(sequence));
    return state().next_position[sequence];
  }

  // All sequences through the block table; an unused number is a sequence without keys. Valid until the next change.
  KvBatch batch() const {
    KvBatch all{store().kv(), lengths()};
    all.kv.home = Home::paged;
    all.kv.block_table = {state().table, {sequences(), state().width}, {state().width, 1}};
    return all;
  }

  // The sequences asked for, in that order, as CSR lists; at most sequences() of them, one may be there twice. Valid until
  // the next change and the next csr().
  Status csr(std::span<const index_t> wanted, KvBatch* out) {
    if (Status status = check_wanted(wanted, 0); !status.ok()) return status;
    *out = list_pages(wanted, 0, state().csr);
    return {};
  }

  // The same without the first `skip` tokens of each, whole pages of them, in lists of the caller's: what follows a shared
  // prefix, one level of a cascade while csr() or batch() is another. Valid until the next change of the cache and the next
  // csr() into these lists. The first call gives `lists` room for any of this cache's, 4 bytes per sequence and page of
  // `longest`; later ones allocate nothing.
  Status csr(std::span<const index_t> wanted, index_t skip, PageLists& lists, KvBatch* out) const {
    if (Status status = check_wanted(wanted, skip); !status.ok()) return status;
    if (Status status = lists.reserve(sequences(), sequences() * state().width); !status.ok()) return status;
    *out = list_pages(wanted, skip, lists.owned_.state);
    return {};
  }

  const std::byte* k_row(index_t sequence, index_t kv_head, index_t token) const {
    return store().k(page_of(sequence, token), kv_head, token % page_size());
  }
  const std::byte* v_row(index_t sequence, index_t kv_head, index_t token) const {
    return store().v_or_k(page_of(sequence, token), kv_head, token % page_size());
  }
  // Only tokens whose page is not shared: those of the last extend, and earlier ones nobody else holds.
  std::byte* writable_k_row(index_t sequence, index_t kv_head, index_t token) {
    FOVEA_ASSERT(references(page_of(sequence, token)) == 1);
    return store().k(page_of(sequence, token), kv_head, token % page_size());
  }
  std::byte* writable_v_row(index_t sequence, index_t kv_head, index_t token) {   // null where V lies in K
    FOVEA_ASSERT(references(page_of(sequence, token)) == 1);
    return store().v(page_of(sequence, token), kv_head, token % page_size());
  }

  // Whether no page is lost, leaked, or listed twice by a sequence, and references add up; in a poisoned cache also whether
  // free pages are untouched. Uses memory of the cache, so not at the same time as another check.
  Status check() const {
    const State& now = state();
    std::fill_n(now.recounted, now.pages, 0);
    std::fill_n(now.last_reader, now.pages, -1);
    for (index_t sequence = 0; sequence < now.sequences; ++sequence) {
      const index_t len = now.len[sequence], used = pages_for(len);
      if (len < 0 || used > now.width || (!now.alive[sequence] && len != 0)) {
        return Status::error(Code::invalid_argument, "cache: sequence %td%s has %td tokens", sequence,
                             now.alive[sequence] ? "" : ", which does not exist,", len);
      }
      for (index_t n = 0; n < now.width; ++n) {
        const std::int32_t page = now.table[entry(sequence, n)];
        if ((n < used) != (page >= 0) || page >= now.pages) {
          return Status::error(Code::invalid_argument, "cache: sequence %td uses %td pages, entry %td is %d", sequence, used,
                               n, page);
        }
        if (n >= used) continue;
        if (now.last_reader[page] == sequence) {
          return Status::error(Code::invalid_argument, "cache: sequence %td has page %d twice", sequence, page);
        }
        now.last_reader[page] = static_cast<std::int32_t>(sequence);
        ++now.recounted[page];
      }
      for (index_t n = 1; n < used; ++n) {
        if (now.first_position[entry(sequence, n)] - now.first_position[entry(sequence, n - 1)] >= page_size()) continue;
        return Status::error(Code::invalid_argument, "cache: sequence %td: page %td starts before page %td ends", sequence,
                             n, n - 1);
      }
      const index_t next = now.next_position[sequence], last = len > 0 ? position(sequence, len - 1) : -1;
      if (next <= last || (len % page_size() != 0 && next != last + 1)) {
        return Status::error(Code::invalid_argument, "cache: sequence %td: position %td comes after %td", sequence, next,
                             last);
      }
    }
    for (index_t n = 0; n < now.free_count; ++n) {
      const std::int32_t page = now.free_pages[n];
      if (page < 0 || page >= now.pages || now.recounted[page] != 0) {
        return Status::error(Code::invalid_argument, "cache: free page %d is in use, or free twice", page);
      }
      now.recounted[page] = kFreeMark;
      if (store().poisoned() && !store().is_poison(page, 0, page_size())) {
        return Status::error(Code::invalid_argument, "cache: free page %d was written", page);
      }
    }
    for (index_t page = 0; page < now.pages; ++page) {
      const std::int32_t counted = now.recounted[page] == kFreeMark ? 0 : now.recounted[page];
      if (counted != now.references[page] || now.recounted[page] == 0) {
        return Status::error(Code::invalid_argument, "cache: page %td has %d references, %d are counted", page,
                             now.references[page], counted);
      }
    }
    return {};
  }

 private:
  static constexpr std::int32_t kNoPage = -1, kFreeMark = -1;
  static constexpr index_t kLastPosition = 0x7fffffff;

  struct State {
    index_t pages = 0, page_size = 1, sequences = 0;
    index_t width = 0;   // pages of a sequence at most
    index_t free_count = 0;
    RowStore store;
    std::int32_t* table = nullptr;                               // [sequence, page of the sequence]  kNoPage behind the last
    std::int32_t* first_position = nullptr;                      // [sequence, page of the sequence]
    index_t* len = nullptr;                                      // [sequence]
    index_t* next_position = nullptr;                            // [sequence]
    bool* alive = nullptr;                                       // [sequence]
    std::int32_t* references = nullptr;                          // [page]
    std::int32_t* free_pages = nullptr;                          // [free_count]  a stack
    PageLists::State csr;                                        // the last csr()
    std::int32_t *recounted = nullptr, *last_reader = nullptr;   // [page]  check()
  };

  State& state() { return owned_.state; }
  const State& state() const { return owned_.state; }
  const RowStore& store() const { return owned_.state.store; }
  index_t entry(index_t sequence, index_t page) const { return sequence * state().width + page; }
  index_t pages_for(index_t len) const { return (len + page_size() - 1) / page_size(); }
  index_t page_of(index_t sequence, index_t token) const {
    FOVEA_ASSERT(token >= 0 && token < len(sequence));
    return state().table[entry(sequence, token / page_size())];
  }

  Status check_alive(index_t sequence) const {
    if (Status status = check_sequence(sequence, sequences()); !status.ok()) return status;
    if (state().alive[sequence]) return {};
    return Status::error(Code::invalid_argument, "cache: sequence %td does not exist", sequence);
  }
  Status check_wanted(std::span<const index_t> wanted, index_t skip) const {
    if (sequences() == 0) return Status::error(Code::invalid_argument, "cache: lists of a cache that was not created");
    const auto count = static_cast<index_t>(wanted.size());
    if (count > sequences())
      return Status::error(Code::invalid_argument, "cache: lists of %td sequences, there are %td", count, sequences());
    if (skip < 0 || skip % page_size() != 0)
      return Status::error(Code::invalid_argument, "cache: lists without the first %td tokens, pages are of %td", skip,
                           page_size());
    for (const index_t sequence : wanted) {
      if (Status status = check_alive(sequence); !status.ok()) return status;
      if (skip > state().len[sequence])
        return Status::error(Code::invalid_argument, "cache: lists without the first %td tokens, sequence %td has %td", skip,
                             sequence, state().len[sequence]);
    }
    return {};
  }
  KvBatch list_pages(std::span<const index_t> wanted, index_t skip, const PageLists::State& to) const {
    to.begin[0] = 0;
    for (std::size_t n = 0; n < wanted.size(); ++n) {
      const auto pages = pages_of(wanted[n]).subspan(static_cast<std::size_t>(skip / page_size()));
      std::copy(pages.begin(), pages.end(), to.page + to.begin[n]);
      to.begin[n + 1] = to.begin[n] + static_cast<index_t>(pages.size());
      to.len[n] = state().len[wanted[n]] - skip;
    }
    KvBatch listed{store().kv(), {to.len, wanted.size()}};
    listed.kv.home = Home::paged;
    listed.kv.page_indices = {to.page, static_cast<std::size_t>(to.begin[wanted.size()])};
    listed.kv.page_begin = {to.begin, wanted.size() + 1};
    return listed;
  }
  Status no_sequence() const {
    return Status::error(Code::out_of_pages, "cache: all %td sequences are in use", sequences());
  }
  index_t unused_sequence() const {
    const bool* const alive = state().alive;
    const bool* const found = std::find(alive, alive + sequences(), false);
    return found == alive + sequences() ? -1 : found - alive;
  }

  bool must_copy_last_page(index_t sequence) const {
    const index_t len = state().len[sequence];
    return len % page_size() != 0 && state().references[state().table[entry(sequence, len / page_size())]] > 1;
  }
  std::int32_t take_page() {
    State& now = state();
    const std::int32_t page = now.free_pages[--now.free_count];
    now.references[page] = 1;
    return page;
  }
  void drop_page(std::int32_t page) {
    State& now = state();
    if (--now.references[page] > 0) return;
    now.free_pages[now.free_count++] = page;
    store().poison(page, 0, page_size());
  }
  // From the last to the first, so that the pool gives them out again in the order of the sequence.
  void drop_pages(index_t sequence, std::size_t first, std::size_t end) {
    std::int32_t* const pages = state().table + entry(sequence, 0);
    for (std::size_t n = end; n-- > first;) drop_page(std::exchange(pages[n], kNoPage));
  }
  void share_pages(index_t from, index_t to, std::size_t count) {
    State& now = state();
    now.alive[to] = true;
    for (std::size_t n = 0; n < count; ++n) {
      const std::int32_t page = now.table[entry(from, 0) + static_cast<index_t>(n)];
      ++now.references[page];
      now.table[entry(to, static_cast<index_t>(n))] = page;
    }
    std::copy_n(now.first_position + entry(from, 0), count, now.first_position + entry(to, 0));
  }

  Owned<State> owned_;
};

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
