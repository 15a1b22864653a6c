// SPDX-License-Identifier: Apache-2.0
// Any mask policy behind function pointers: tests put many masks through attention, and each type of mask would compile the
// whole tile loop once more.
#pragma once
#include "fovea/engine/policies.hpp"

namespace test {

class AnyMask {
 public:
  template <fovea::Mask M>
  explicit AnyMask(const M& mask)
      : mask_(&mask),
        hull_([](const void* m, std::span<const fovea::Row> rows) { return static_cast<const M*>(m)->hull(rows); }),
        cover_([](const void* m, const fovea::Tile& tile) { return static_cast<const M*>(m)->cover(tile); }),
        keep_([](const void* m, const fovea::Row& row, const fovea::i32& pos, fovea::keep_t& keep) {
          keep = static_cast<const M*>(m)->at(row)(pos);
        }) {}

  struct Lane {
    const AnyMask* any;
    fovea::Row row;
    fovea::keep_t operator()(fovea::i32 pos) const {
      fovea::keep_t keep = fovea::f32(0.f) != fovea::f32(0.f);
      any->keep_(any->mask_, row, pos, keep);
      return keep;
    }
  };
  Lane at(const fovea::Row& row) const { return {this, row}; }
  fovea::KeyRange hull(std::span<const fovea::Row> rows) const { return hull_(mask_, rows); }
  fovea::Cover cover(const fovea::Tile& tile) const { return cover_(mask_, tile); }

 private:
  const void* mask_;
  fovea::KeyRange (*hull_)(const void*, std::span<const fovea::Row>);
  fovea::Cover (*cover_)(const void*, const fovea::Tile&);
  void (*keep_)(const void*, const fovea::Row&, const fovea::i32&, fovea::keep_t&);
};

}   // namespace test
