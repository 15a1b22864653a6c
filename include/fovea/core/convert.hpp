// SPDX-License-Identifier: Apache-2.0
// Numbers of one format as numbers of another, one at a time: convert<bf16>(x), convert<float>(h). Every pair of float,
// double, bf16, f16, fp8_e4m3, fp8_e5m2 and their twins of other libraries (StorageOf). Widening is exact; narrowing rounds
// once, to nearest, ties to even, from double as well as from float. Too large a number becomes infinity, in e4m3 (no
// infinity) NaN; NaN stays NaN: quiet, its sign and the upper bits of its payload kept. Only integers are calculated with,
// so neither the rounding mode nor flush-to-zero of the calling thread changes a bit.
#pragma once
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "formats.hpp"
#include "view.hpp"

namespace fovea {
inline namespace v0 {

// What stores the same bits: itself for fovea's own formats, f16 for _Float16, bf16 for __bf16. An adapter adds its
// library's types here and to FormatOf.
template <class T>
struct StorageOf {
  using type = T;
};
#if defined(__FLT16_MANT_DIG__)
template <>
struct StorageOf<_Float16> {
  using type = f16;
};
template <>
struct FormatOf<_Float16> : FormatOf<f16> {};
#endif
// g++ 13 announces __bf16 by a macro; clang 15 has it on x86 wherever there is SSE2, on Arm behind a macro of its own.
#if defined(__BFLT16_MANT_DIG__) || (defined(__clang__) && __clang_major__ >= 15 && defined(__SSE2__)) || \
    defined(__ARM_BF16_FORMAT_ALTERNATIVE)
#define FOVEA_HAS_BF16_TYPE 1
template <>
struct StorageOf<__bf16> {
  using type = bf16;
};
template <>
struct FormatOf<__bf16> : FormatOf<bf16> {};
#endif

// The same numbers under fovea's name for their format, nothing copied.
template <class T, int Rank>
FOVEA_DATA_INLINE auto as_storage(View<T, Rank> view) {
  using Number = std::remove_const_t<T>;
  using Storage = typename StorageOf<Number>::type;
  if constexpr (std::is_same_v<Storage, Number>) {
    return view;
  } else {
    static_assert(sizeof(Storage) == sizeof(Number) && alignof(Storage) <= alignof(Number));
    using Element = std::conditional_t<std::is_const_v<T>, const Storage, Storage>;
    return View<Element, Rank>{reinterpret_cast<Element*>(view.data), view.extent, view.stride};
  }
}

// The fields of a small format. Without its sign, patterns ascend with the numbers they stand for, so rounding may carry
// from the mantissa into the exponent, and from the largest number into `overflow`: infinity, or what stands for it.
template <class T>
struct SmallFloat;
template <>
struct SmallFloat<bf16> {
  static constexpr int mantissa = 7, min_exponent = -126;
  static constexpr std::uint32_t sign = 0x8000, overflow = 0x7f80, quiet_nan = 0x7fc0;
  static constexpr bool has_infinity = true;
};
template <>
struct SmallFloat<f16> {
  static constexpr int mantissa = 10, min_exponent = -14;
  static constexpr std::uint32_t sign = 0x8000, overflow = 0x7c00, quiet_nan = 0x7e00;
  static constexpr bool has_infinity = true;
};
template <>
struct SmallFloat<fp8_e4m3> {
  static constexpr int mantissa = 3, min_exponent = -6;
  static constexpr std::uint32_t sign = 0x80, overflow = 0x7f, quiet_nan = 0x7f;
  static constexpr bool has_infinity = false;
};
template <>
struct SmallFloat<fp8_e5m2> {
  static constexpr int mantissa = 2, min_exponent = -14;
  static constexpr std::uint32_t sign = 0x80, overflow = 0x7c, quiet_nan = 0x7e;
  static constexpr bool has_infinity = true;
};

template <class T>
concept SmallNumber =
    std::same_as<T, bf16> || std::same_as<T, f16> || std::same_as<T, fp8_e4m3> || std::same_as<T, fp8_e5m2>;

template <SmallNumber T>
FOVEA_DATA_INLINE constexpr T small_pattern(std::uint64_t bits) {
  return T{static_cast<decltype(T::bits)>(bits)};
}

template <SmallNumber T>
FOVEA_DATA_INLINE constexpr T narrow(double x) {
  using S = SmallFloat<T>;
  const auto bits = std::bit_cast<std::uint64_t>(x), magnitude = bits & 0x7fff'ffff'ffff'ffffu;
  const std::uint64_t sign = bits >> 63 != 0 ? S::sign : 0u;
  constexpr std::uint64_t kInfinity = 0x7ff0'0000'0000'0000u, kHidden = std::uint64_t{1} << 52;
  if (magnitude > kInfinity) {
    const std::uint64_t payload = (magnitude & (kHidden - 1)) >> (52 - S::mantissa);
    return small_pattern<T>(sign | S::quiet_nan | payload);
  }
  const int exponent = static_cast<int>(magnitude >> 52) - 1023;
  if (exponent > 127) return small_pattern<T>(sign | S::overflow);
  if (exponent < S::min_exponent - S::mantissa - 1) return small_pattern<T>(sign);   // below half the smallest denormal
  const int below = exponent < S::min_exponent ? S::min_exponent - exponent : 0;
  const int dropped = 52 - S::mantissa + below;
  const std::uint64_t significand = kHidden | (magnitude & (kHidden - 1));
  const std::uint64_t kept = significand >> dropped, rest = significand & ((std::uint64_t{1} << dropped) - 1);
  const std::uint64_t half = std::uint64_t{1} << (dropped - 1);
  const std::uint64_t up = rest > half || (rest == half && (kept & 1) != 0) ? 1 : 0;
  const auto binade = static_cast<std::uint64_t>(exponent + below - S::min_exponent) << S::mantissa;
  const std::uint64_t pattern = binade + kept + up;
  return small_pattern<T>(sign | (pattern < S::overflow ? pattern : S::overflow));
}

// The same from float for bf16, its upper half: the conversion that a store of many numbers does one by one.
FOVEA_DATA_INLINE constexpr bf16 narrow_to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fff'ffffu) > 0x7f80'0000u) return small_pattern<bf16>((bits >> 16) | 0x40u);
  return small_pattern<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <SmallNumber T>
FOVEA_DATA_INLINE constexpr double widen(T x) {
  using S = SmallFloat<T>;
  const std::uint64_t magnitude = x.bits & (S::sign - 1), sign = (x.bits & S::sign) != 0 ? std::uint64_t{1} << 63 : 0;
  const std::uint64_t field = magnitude >> S::mantissa, fraction = magnitude & ((1u << S::mantissa) - 1);
  if (magnitude >= S::overflow) {
    const bool infinite = S::has_infinity && magnitude == S::overflow;
    const std::uint64_t payload = fraction << (52 - S::mantissa);
    return std::bit_cast<double>(sign | (infinite ? 0x7ff0'0000'0000'0000u : 0x7ff8'0000'0000'0000u | payload));
  }
  if (field == 0) {
    constexpr auto kUnit = std::bit_cast<double>(static_cast<std::uint64_t>(S::min_exponent - S::mantissa + 1023) << 52);
    const double size = static_cast<double>(fraction) * kUnit;
    return sign != 0 ? -size : size;
  }
  const std::uint64_t exponent = field + static_cast<std::uint64_t>(S::min_exponent - 1 + 1023);
  return std::bit_cast<double>(sign | exponent << 52 | fraction << (52 - S::mantissa));
}

template <class T>
concept PlainNumber = std::same_as<T, float> || std::same_as<T, double> || SmallNumber<T>;
template <class T>
concept Number = PlainNumber<typename StorageOf<T>::type>;

template <Number To, Number From>
FOVEA_DATA_INLINE constexpr To convert(From x) {
  using ToStored = typename StorageOf<To>::type;
  using FromStored = typename StorageOf<From>::type;
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (!std::is_same_v<From, FromStored>) {
    return convert<To>(std::bit_cast<FromStored>(x));
  } else if constexpr (!std::is_same_v<To, ToStored>) {
    return std::bit_cast<To>(convert<ToStored>(x));
  } else if constexpr (std::is_same_v<To, bf16> && std::is_same_v<From, float>) {
    return narrow_to_bf16(x);
  } else if constexpr (SmallNumber<To> && SmallNumber<From>) {
    return narrow<To>(widen(x));
  } else if constexpr (SmallNumber<To>) {
    return narrow<To>(static_cast<double>(x));
  } else if constexpr (std::is_same_v<To, float> && std::is_same_v<From, bf16>) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
  } else if constexpr (SmallNumber<From>) {
    return static_cast<To>(widen(x));
  } else {
    return static_cast<To>(x);
  }
}

// Too large a number, infinity included, becomes the largest one: what fp8 weights are commonly cast with.
template <SmallNumber To, Number From>
FOVEA_DATA_INLINE constexpr To convert_saturated(From x) {
  using S = SmallFloat<To>;
  const auto wide = convert<double>(x);
  const To nearest = convert<To>(x);
  if (wide != wide || (nearest.bits & (S::sign - 1)) < S::overflow) return nearest;
  return small_pattern<To>((nearest.bits & S::sign) | (S::overflow - 1));
}

}   // namespace v0
}   // namespace fovea
