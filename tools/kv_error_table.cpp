// SPDX-License-Identifier: Apache-2.0
// kv_error_table: what a storage format of K and V costs, as the Markdown tables of docs/storage.md. Attention over the
// stored rows, in double, against attention over the numbers they were made from: the error of the format alone. What the
// kernels add is printed below the tables: the distance of fovea::attention on the same stored rows from that result. Last,
// the error of single numbers under the rules that a scale could be chosen by.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <numbers>
#include <optional>
#include <vector>

#include "fovea/attention.hpp"
#include "fovea/reference/stored.hpp"
#include "fovea/simd/quantise.hpp"

namespace {

using fovea::Format;
using fovea::index_t;

constexpr index_t kHeads = 4, kQueries = 32, kKeys = 2048, kDim = 128;

// splitmix64 and Box-Muller.
class Gaussian {
 public:
  explicit Gaussian(std::uint64_t seed) : state_(seed) {}
  float operator()() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform())), angle = 2 * std::numbers::pi * uniform();
    return static_cast<float>(radius * std::cos(angle));
  }

 private:
  double uniform() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1p-53;
  }
  std::uint64_t state_;
};

std::size_t count_of(index_t heads, index_t len, index_t dim) { return static_cast<std::size_t>(heads * len * dim); }

struct Data {
  std::uint64_t seed;
  index_t heads, dim_qk, dim_v;
  std::vector<float> q, k, v;   // [head, pos, dim]
};

// `outliers` channels of K, evenly spread, are 20 times as large. A latent V is the head of its K.
Data make_data(std::uint64_t seed, index_t heads, index_t dim_qk, index_t dim_v, index_t outliers, bool latent) {
  Data data{seed, heads, dim_qk, dim_v, {}, {}, {}};
  Gaussian gaussian(seed);
  data.q.resize(count_of(heads, kQueries, dim_qk));
  data.k.resize(count_of(heads, kKeys, dim_qk));
  data.v.resize(count_of(heads, kKeys, dim_v));
  for (auto* numbers : {&data.q, &data.k, &data.v}) {
    for (float& x : *numbers) x = gaussian();
  }
  for (std::size_t row = 0; row < data.k.size(); row += static_cast<std::size_t>(dim_qk)) {
    for (index_t n = 0; n < outliers; ++n) data.k[row + static_cast<std::size_t>(n * kDim / outliers + 5)] *= 20;
  }
  if (latent) {
    for (index_t row = 0; row < heads * kKeys; ++row) {
      std::copy_n(data.k.begin() + row * dim_qk, dim_v, data.v.begin() + row * dim_v);
    }
  }
  return data;
}

struct StoredRows {
  std::vector<std::byte> bytes;
  std::vector<float> channel_scale;   // [head, dim]
};

StoredRows store(Format format, const std::vector<float>& x, index_t heads, index_t dim) {
  StoredRows rows;
  const auto view = fovea::bhsd<const float>(x.data(), 1, heads, kKeys, dim);
  if (format == Format::i8_channel) {
    rows.channel_scale.assign(static_cast<std::size_t>(heads * dim), 0.f);
    fovea::widen_channels(view, rows.channel_scale.data());
    fovea::channel_scales(rows.channel_scale.data(), heads * dim, rows.channel_scale.data());
  }
  const index_t row = fovea::row_bytes(format, dim);
  rows.bytes.resize(static_cast<std::size_t>(heads * kKeys * row));
  const float* const scale = rows.channel_scale.empty() ? nullptr : rows.channel_scale.data();
  fovea::quantise(view, format, rows.bytes.data(), {0, kKeys * row, row}, scale).or_throw();
  return rows;
}

// `dim` numbers of each row of `row_dim`.
std::vector<double> decode(Format format, const StoredRows& rows, index_t heads, index_t row_dim, index_t dim) {
  std::vector<double> numbers;
  const index_t bytes = fovea::row_bytes(format, row_dim);
  for (index_t row = 0; row < heads * kKeys; ++row) {
    const float* const scale = rows.channel_scale.empty() ? nullptr : rows.channel_scale.data() + row / kKeys * row_dim;
    for (index_t d = 0; d < dim; ++d) {
      numbers.push_back(fovea::reference::stored_value(format, rows.bytes.data() + row * bytes, row_dim, d, scale));
    }
  }
  return numbers;
}

std::vector<double> widened(const std::vector<float>& x) { return {x.begin(), x.end()}; }

// out [head, query, dim_v]; every query sees every key.
std::vector<double> attend(const Data& data, const std::vector<double>& k, const std::vector<double>& v) {
  std::vector<double> out(count_of(data.heads, kQueries, data.dim_v)), weights(static_cast<std::size_t>(kKeys));
  const double scale = 1 / std::sqrt(static_cast<double>(data.dim_qk));
  for (index_t row = 0; row < data.heads * kQueries; ++row) {
    const index_t head = row / kQueries;
    double max = -HUGE_VAL, sum = 0;
    for (index_t j = 0; j < kKeys; ++j) {
      double dot = 0;
      for (index_t d = 0; d < data.dim_qk; ++d) {
        dot += double{data.q[static_cast<std::size_t>(row * data.dim_qk + d)]} *
               k[static_cast<std::size_t>((head * kKeys + j) * data.dim_qk + d)];
      }
      weights[static_cast<std::size_t>(j)] = scale * dot;
      max = std::max(max, scale * dot);
    }
    for (double& weight : weights) sum += weight = std::exp(weight - max);
    for (index_t j = 0; j < kKeys; ++j) {
      for (index_t d = 0; d < data.dim_v; ++d) {
        out[static_cast<std::size_t>(row * data.dim_v + d)] +=
            weights[static_cast<std::size_t>(j)] / sum * v[static_cast<std::size_t>((head * kKeys + j) * data.dim_v + d)];
      }
    }
  }
  return out;
}

struct Error {
  double max, rms, cosine;   // max and rms divided by the rms of the exact output; cosine as 1 - cos
};

Error error_of(const std::vector<double>& out, const std::vector<double>& exact) {
  double max = 0, difference = 0, size = 0, out_size = 0, dot = 0;
  for (std::size_t n = 0; n < out.size(); ++n) {
    max = std::max(max, std::abs(out[n] - exact[n]));
    difference += (out[n] - exact[n]) * (out[n] - exact[n]);
    size += exact[n] * exact[n];
    out_size += out[n] * out[n];
    dot += out[n] * exact[n];
  }
  const double rms = std::sqrt(size / static_cast<double>(out.size()));
  return {max / rms, std::sqrt(difference / size), 1 - dot / std::sqrt(size * out_size)};
}

void print_cell(std::optional<Error> error) {
  if (!error) {
    std::printf(" | - | - | -");
  } else if (error->max == 0) {
    std::printf(" | 0 | 0 | 0");
  } else {
    std::printf(" | %.1e | %.1e | %.0e", error->max, error->rms, std::max(error->cosine, 0.));
  }
}

std::optional<std::vector<double>> kernel_output(const Data& data, Format k_format, const StoredRows& k, Format v_format,
                                                 const StoredRows& v,
                                               fovea::Panels panels) {
  fovea::Kv kv;
  kv.k = fovea::stored_rows(k.bytes.data(), k_format, data.dim_qk, data.heads, kKeys);
  kv.v = fovea::stored_rows(v.bytes.data(), v_format, v_format == Format::latent_fp8 ? data.dim_qk : data.dim_v, data.heads,
                            kKeys);
  kv.kv_heads = data.heads;
  kv.dim_qk = data.dim_qk;
  kv.dim_v = data.dim_v;
  kv.len = kKeys;
  kv.k_channel_scale = k.channel_scale.empty() ? nullptr : k.channel_scale.data();
  std::vector<float> out(count_of(data.heads, kQueries, data.dim_v));
  const fovea::Status status =
      fovea::attention(fovea::bhsd<const float>(data.q.data(), 1, data.heads, kQueries, data.dim_qk), kv,
                       fovea::bhsd<float>(out.data(), 1, data.heads, kQueries, data.dim_v), {.panels = panels});
  if (!status.ok()) {
    std::fprintf(stderr, "%s\n", status.message());
    return std::nullopt;
  }
  return widened(out);
}

// The worst distance of fovea::attention from double over the same stored rows.
double kernel_worst = 0;
// The same where packed regimes multiply in bf16, for formats that they may: largest and RMS.
Error bf16_worst{};
bool kernel_failed = false;

void print_row(const Data& data, const std::vector<double>& exact, Format format) {
  const bool latent = format == Format::latent_fp8;
  const std::vector<double> k = widened(data.k), v = widened(data.v);
  const StoredRows k_rows = store(format, data.k, data.heads, data.dim_qk);
  const std::vector<double> k_stored = decode(format, k_rows, data.heads, data.dim_qk, data.dim_qk);

  const Format v_format = format == Format::i8_channel ? Format::i8_token : format;   // i8_channel is for K only
  const StoredRows v_rows = latent ? k_rows : store(v_format, data.v, data.heads, data.dim_v);
  const std::vector<double> v_stored = decode(v_format, v_rows, data.heads, latent ? data.dim_qk : data.dim_v, data.dim_v);
  const std::vector<double> both = attend(data, k_stored, v_stored);
  std::printf("| %s | %td", fovea::name_of(format), fovea::row_bytes(format, data.dim_qk));
  print_cell(error_of(attend(data, k_stored, v), exact));
  print_cell(v_format == format ? std::optional(error_of(attend(data, k, v_stored), exact)) : std::nullopt);
  print_cell(error_of(both, exact));
  std::printf(" |\n");
  const auto kernel = kernel_output(data, format, k_rows, v_format, v_rows, fovea::Panels::f32);
  if (kernel) kernel_worst = std::max(kernel_worst, error_of(*kernel, both).max);
  kernel_failed = kernel_failed || !kernel;
  if (!fovea::kHasBf16Dot || format == Format::f32 || format == Format::f64) return;
  const auto bf16 = kernel_output(data, format, k_rows, v_format, v_rows, fovea::Panels::bf16);
  kernel_failed = kernel_failed || !bf16;
  if (!bf16) return;
  const Error error = error_of(*bf16, both);
  if (error.rms > bf16_worst.rms) bf16_worst = error;
}

void print_table(const char* title, index_t outliers) {
  std::printf("**%s**\n\n", title);
  std::printf("| format | bytes | K max | K RMS | K 1-cos | V max | V RMS | V 1-cos | both max | both RMS | both 1-cos |\n");
  std::printf("|---|---|---|---|---|---|---|---|---|---|---|\n");
  const Data data = make_data(outliers == 0 ? 1 : 2, kHeads, kDim, kDim, outliers, false);
  const std::vector<double> exact = attend(data, widened(data.k), widened(data.v));
  for (int n = 0; n < fovea::kFormats; ++n) {
    const auto format = static_cast<Format>(n);
    if (format != Format::f64 && format != Format::latent_fp8) print_row(data, exact, format);   // f64 of fp32 is f32
  }
  const Data latent = make_data(outliers == 0 ? 3 : 4, 1, fovea::kLatentFp8Dim, fovea::kLatentFp8Values, outliers, true);
  const std::vector<double> latent_exact = attend(latent, widened(latent.k), widened(latent.v));
  print_row(latent, latent_exact, Format::latent_fp8);
  std::printf("\n");
}

// One group of numbers under one rule for its scale, back as numbers; scales are not rounded here.
using Rule = double (*)(double x, double high, double low);

double symmetric(double x, double scale, double lowest, double highest) {
  return scale * std::clamp(std::nearbyint(x / scale), lowest, highest);
}
double by_largest(double x, double high, double low) { return symmetric(x, std::max(high, -low) / 7, -7, 7); }
double by_signed_largest(double x, double high, double low) { return symmetric(x, (high > -low ? high : low) / -8, -8, 7); }
double by_both_sides(double x, double high, double low) {
  const double larger = std::max(high, -low), smaller = std::min(high, -low), scale = std::max(larger / 8, smaller / 7);
  return symmetric(x, high > 7.5 * scale ? -scale : scale, -8, 7);
}
double by_range(double x, double high, double low) {
  const double scale = (high - low) / 15;
  return low + scale * std::clamp(std::nearbyint((x - low) / scale), 0., 15.);
}
template <class T>
double by_largest_fp8(double x, double high, double low) {
  const double scale = std::max(high, -low) / fovea::convert<double>(fovea::convert_saturated<T>(HUGE_VAL));
  return scale * fovea::convert<double>(fovea::convert<T>(x / scale));
}
template <class T>
double by_power_of_two(double x, double high, double low) {
  const double wanted = std::max(high, -low) / fovea::convert<double>(fovea::convert_saturated<T>(HUGE_VAL));
  const double scale = std::exp2(std::ceil(std::log2(wanted)));
  return scale * fovea::convert<double>(fovea::convert<T>(x / scale));
}
template <class T>
double unscaled(double x, double, double) {
  return fovea::convert<double>(fovea::convert<T>(x));
}

// RMS error of single numbers over that of the numbers, `groups` rows of `size` numbers; the first is `outlier` times as
// large.
double rule_error(Rule rule, std::size_t size, float outlier) {
  constexpr int kGroups = 20000;
  Gaussian gaussian(5);
  std::vector<double> x(size);
  double difference = 0, square = 0;
  for (int n = 0; n < kGroups; ++n) {
    for (double& number : x) number = double{gaussian()};
    x[0] *= double{outlier};
    const auto [low, high] = std::minmax_element(x.begin(), x.end());
    for (const double number : x) {
      const double error = rule(number, *high, *low) - number;
      difference += error * error;
      square += number * number;
    }
  }
  return std::sqrt(difference / square);
}

void print_rules() {
  struct Line {
    const char* name;
    Rule rule;
    std::size_t size;
  };
  const Line lines[] = {
      {"int4, 32: max/7", by_largest, 32},
      {"int4, 32: signed extreme / -8, other side clips", by_signed_largest, 32},
      {"int4, 32: max(larger side / 8, smaller side / 7)", by_both_sides, 32},
      {"int4, 32: (max - min) / 15 and zero", by_range, 32},
      {"int4, 64: max/7", by_largest, 64},
      {"int4, 64: signed extreme / -8, other side clips", by_signed_largest, 64},
      {"int4, 64: max(larger side / 8, smaller side / 7)", by_both_sides, 64},
      {"int4, 64: (max - min) / 15 and zero", by_range, 64},
      {"e4m3, 128: max/448", by_largest_fp8<fovea::fp8_e4m3>, 128},
      {"e4m3, 128: power of two", by_power_of_two<fovea::fp8_e4m3>, 128},
      {"e4m3, 128: no scale", unscaled<fovea::fp8_e4m3>, 128},
      {"e5m2, 128: max/57344", by_largest_fp8<fovea::fp8_e5m2>, 128},
      {"e5m2, 128: power of two", by_power_of_two<fovea::fp8_e5m2>, 128},
      {"e5m2, 128: no scale", unscaled<fovea::fp8_e5m2>, 128},
  };
  std::printf("| rule | Gaussian | one number of the group times 20 |\n|---|---|---|\n");
  for (const Line& line : lines) {
    std::printf("| %s | %.4f | %.4f |\n", line.name, rule_error(line.rule, line.size, 1),
                rule_error(line.rule, line.size, 20));
  }
}

}   // namespace

int main() {
  print_table("Gaussian data", 0);
  print_table("Gaussian data, four channels of K times 20", 4);
  std::printf("fovea::attention on the same stored rows is within %.1e of these results (of the output's RMS).\n\n",
              kernel_worst);
  if (fovea::kHasBf16Dot)
    std::printf("With Panels::bf16: max %.1e, RMS %.1e, in the worst row of the tables.\n\n", bf16_worst.max, bf16_worst.rms);
  print_rules();
  return kernel_failed ? 1 : 0;
}
