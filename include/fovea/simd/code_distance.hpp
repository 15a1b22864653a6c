// SPDX-License-Identifier: Apache-2.0
// 2-bit codes of rows and the Manhattan distance between them (Adamas, arXiv 2510.18413): number i of a row becomes 0 .. 3
// by three thresholds and lies in the bits 2 (i % 4), 2 (i % 4) + 1 of byte i / 4, so 128 numbers are 32 bytes and eight
// codes a little-endian 16-bit word, as in the published kernels.
//
// |a - b| of 2-bit numbers is not the popcount of a ^ b with its weights: for the pair (1, 2), the two most common codes,
// that gives 3 instead of 1. Three ways around, all exact:
//   AVX-512 with VPOPCNTDQ and GFNI   |a - b| counts the thresholds between a and b; the bits "at least 1" and "3" of a code
//                                     are one majority of code, swapped code and a constant, "at least 2" is the upper bit
//   AVX2                              bytes of one code each, vpsadbw
//   anything else                     a ^ b with the upper bit of (1, 2) cleared, summed in fields of 2, 4, 8, 16 bits
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace fovea {
inline namespace v0 {

// exact: the sum of |a - b|. xor_popcount: what the CUDA kernel released with the paper computes, which counts the pair of
// codes 1 and 2 as 3; for checkpoints and measurements that were made with it.
enum class CodeDistance : std::uint8_t { exact, xor_popcount };

inline namespace FOVEA_ARCH {

constexpr index_t code_bytes(index_t dim) { return dim / 4; }
inline constexpr index_t kMaxCodeDim = 512;

// Rows that can be coded: what the Hadamard transform takes, in whole bytes.
constexpr bool is_code_dim(index_t dim) { return dim >= 4 && dim <= kMaxCodeDim && (dim & (dim - 1)) == 0; }
constexpr index_t largest_distance(index_t dim) { return 3 * dim; }

// Codes of the thresholds -t, 0, t: how many of them are below the number. Equality goes to the lower code, a NaN to 0.
inline void write_codes(const float* numbers, index_t dim, float threshold, std::byte* to) {
  std::uint8_t codes[kMaxCodeDim];
  for (index_t i = 0; i < dim; ++i)
    codes[i] = static_cast<std::uint8_t>((numbers[i] > -threshold) + (numbers[i] > 0.f) + (numbers[i] > threshold));
  for (index_t i = 0; i < dim; i += 4)
    to[i / 4] = static_cast<std::byte>(codes[i] | codes[i + 1] << 2 | codes[i + 2] << 4 | codes[i + 3] << 6);
}

namespace code_distance {

using Word = std::uint64_t;
inline constexpr Word kLower = 0x5555555555555555u;

// Sum of the fields of `words` words of a key, each word as four fields of 16 bits until the end.
template <CodeDistance Kind>
FOVEA_INLINE std::uint16_t portable(const std::byte* query, const std::byte* key, index_t bytes) {
  constexpr Word kTwo = 0x3333333333333333u, kFour = 0x0f0f0f0f0f0f0f0fu, kEight = 0x00ff00ff00ff00ffu;
  Word sum = 0;
  for (index_t at = 0; at < bytes; at += 8) {
    const auto count = static_cast<std::size_t>(std::min<index_t>(8, bytes - at));
    Word q = 0, k = 0;
    std::memcpy(&q, query + at, count);
    std::memcpy(&k, key + at, count);
    Word field = q ^ k;
    if constexpr (Kind == CodeDistance::exact) {
      // Both bits differ and so do the two bits of the query's code: the pair is (1, 2) or (2, 1), whose distance is 1.
      const Word crossed = field & (field >> 1) & (q ^ (q >> 1)) & kLower;
      field ^= crossed << 1;
    }
    field = (field & kTwo) + ((field >> 2) & kTwo);
    field = (field & kFour) + ((field >> 4) & kFour);
    sum += (field & kEight) + ((field >> 8) & kEight);
  }
  return static_cast<std::uint16_t>((sum * 0x0001000100010001u) >> 48);
}

#if defined(__AVX512VPOPCNTDQ__) && defined(__AVX512BW__) && defined(__GFNI__)
inline constexpr index_t kKeysAtOnce = 8;

// Two keys of 32 bytes to a vector, four vectors at once; lane sums of the four stand in 16-bit fields of one.
template <CodeDistance Kind>
class Query32 {
 public:
  FOVEA_INLINE explicit Query32(const std::byte* codes)
      : codes_(_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)))), outer_(outer(codes_)) {}

  FOVEA_INLINE void distances(const std::byte* keys, std::uint16_t* to) const {
    __m512i sum = one_pair(keys);
    sum = _mm512_add_epi64(sum, _mm512_slli_epi64(one_pair(keys + 64), 16));
    sum = _mm512_add_epi64(sum, _mm512_slli_epi64(one_pair(keys + 128), 32));
    sum = _mm512_add_epi64(sum, _mm512_slli_epi64(one_pair(keys + 192), 48));
    sum = _mm512_add_epi64(sum, _mm512_permutex_epi64(sum, 0x4e));
    sum = _mm512_add_epi64(sum, _mm512_shuffle_epi32(sum, _MM_PERM_BADC));
    const __m128i even = _mm512_castsi512_si128(sum), odd = _mm512_extracti32x4_epi32(sum, 2);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(even, odd));
  }

 private:
  // Upper bit of a code: it is at least 1. Lower bit: it is 3. The majority of (a, b, c) is a | b where c is 1 and a & b
  // where it is 0.
  FOVEA_INLINE static __m512i outer(__m512i codes) {
    const __m512i swap = _mm512_set1_epi64(0x0201080420108040);   // output bit i is input bit i ^ 1
    const __m512i swapped = _mm512_gf2p8affine_epi64_epi8(codes, swap, 0);
    return _mm512_ternarylogic_epi64(codes, swapped, upper(), 0xe8);
  }
  FOVEA_INLINE static __m512i upper() { return _mm512_set1_epi8(static_cast<char>(0xaa)); }

  FOVEA_INLINE __m512i one_pair(const std::byte* keys) const {
    const __m512i key = _mm512_loadu_si512(keys);
    const __m512i differ_upper = _mm512_ternarylogic_epi64(key, codes_, upper(), 0x28);   // (key ^ query) & upper
    __m512i other;
    if constexpr (Kind == CodeDistance::exact) {
      other = _mm512_xor_si512(outer(key), outer_);
    } else {
      other = _mm512_xor_si512(key, codes_);
    }
    return _mm512_add_epi64(_mm512_popcnt_epi64(differ_upper), _mm512_popcnt_epi64(other));
  }

  __m512i codes_, outer_;
};
#elif defined(__AVX2__)
inline constexpr index_t kKeysAtOnce = 4;

template <CodeDistance Kind>
class Query32 {
 public:
  FOVEA_INLINE explicit Query32(const std::byte* codes)
      : codes_(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes))) {
    FOVEA_UNROLL
    for (int j = 0; j < 4; ++j) spread_[j] = Kind == CodeDistance::exact ? spread(codes_, j) : _mm256_setzero_si256();
  }

  FOVEA_INLINE void distances(const std::byte* keys, std::uint16_t* to) const {
    __m256i sum = one(keys);
    sum = _mm256_add_epi64(sum, _mm256_slli_epi64(one(keys + 32), 16));
    sum = _mm256_add_epi64(sum, _mm256_slli_epi64(one(keys + 64), 32));
    sum = _mm256_add_epi64(sum, _mm256_slli_epi64(one(keys + 96), 48));
    const __m128i half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_add_epi64(half, _mm_unpackhi_epi64(half, half)));
  }

 private:
  // Code j of every byte. Bits that cross from the neighbour in a 16-bit lane are masked away.
  FOVEA_INLINE static __m256i spread(__m256i codes, int j) {
    return _mm256_and_si256(_mm256_srli_epi16(codes, 2 * j), _mm256_set1_epi8(3));
  }
  FOVEA_INLINE __m256i one(const std::byte* at) const {
    __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if constexpr (Kind == CodeDistance::xor_popcount) key = _mm256_xor_si256(key, codes_);
    __m256i sum = _mm256_sad_epu8(spread(key, 0), spread_[0]);
    FOVEA_UNROLL
    for (int j = 1; j < 4; ++j) sum = _mm256_add_epi64(sum, _mm256_sad_epu8(spread(key, j), spread_[j]));
    return sum;
  }

  __m256i codes_, spread_[4];
};
#endif

template <CodeDistance Kind>
void rows(const std::byte* query, index_t bytes, const std::byte* keys, index_t stride, index_t count, std::uint16_t* to) {
  index_t i = 0;
#if defined(__AVX2__)
  if (bytes == 32 && stride == 32) {
    const Query32<Kind> spread(query);
    for (; i + kKeysAtOnce <= count; i += kKeysAtOnce) spread.distances(keys + 32 * i, to + i);
  }
#endif
  const auto rest = [&]<index_t kBytes>() {
    for (; i < count; ++i) to[i] = portable<Kind>(query, keys + i * stride, kBytes == 0 ? bytes : kBytes);
  };
  switch (bytes) {
    case 16:
      return rest.template operator()<16>();
    case 32:
      return rest.template operator()<32>();
    case 64:
      return rest.template operator()<64>();
    default:
      return rest.template operator()<0>();
  }
}

}   // namespace code_distance

// to[i] = the distance of the query's codes to those of key i, which lie `stride` bytes apart (`bytes` each). At most
// largest_distance(4 * bytes).
inline void code_distances(CodeDistance kind, const std::byte* query, index_t bytes, const std::byte* keys, index_t stride,
                           index_t count, std::uint16_t* to) {
  if (kind == CodeDistance::exact) {
    code_distance::rows<CodeDistance::exact>(query, bytes, keys, stride, count, to);
  } else {
    code_distance::rows<CodeDistance::xor_popcount>(query, bytes, keys, stride, count, to);
  }
}

}   // namespace FOVEA_ARCH
}   // namespace v0
}   // namespace fovea
