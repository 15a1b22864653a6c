// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE: tokens 0 .. 255 are the bytes, every further token joins two earlier ones. No text is outside the
// vocabulary.
#pragma once
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "files.hpp"

namespace generate {

using Token = std::int32_t;

class Tokenizer {
 public:
  // {"vocab_size": n, "pieces": [[byte, ...], ...], "merges": [[left, right], ...]}; merge m makes token 256 + m.
  static Result<Tokenizer> parse(std::span<const std::byte> bytes) {
    using Parsed = Result<Tokenizer>;
    auto json = parse_json(bytes, "the tokenizer");
    if (!json) return Parsed::failure(json.error);
    const Json pieces = json->value("pieces", Json()), merges = json->value("merges", Json());
    std::uint64_t vocab_size = 0;
    if (!read_unsigned(json->value("vocab_size", Json()), kMostTokens, vocab_size) || vocab_size < kBytes) {
      return Parsed::failure("the tokenizer's vocab_size must be a number from 256 to 2^20");
    }
    if (!pieces.is_array() || pieces.size() != vocab_size || !merges.is_array() || merges.size() != vocab_size - kBytes) {
      return Parsed::failure("the tokenizer needs %zu pieces and %zu merges", static_cast<std::size_t>(vocab_size),
                             static_cast<std::size_t>(vocab_size - kBytes));
    }
    Tokenizer tokenizer;
    for (std::size_t token = 0; token < vocab_size; ++token) {
      std::string piece;
      if (token < kBytes) {
        piece = static_cast<char>(static_cast<unsigned char>(token));
      } else {
        const Json& pair = merges[token - kBytes];
        std::uint64_t left = 0, right = 0;
        if (!pair.is_array() || pair.size() != 2 || !read_unsigned(pair[0], token - 1, left) ||
            !read_unsigned(pair[1], token - 1, right)) {
          return Parsed::failure("merge %zu of the tokenizer must join two earlier tokens", token - kBytes);
        }
        piece = tokenizer.pieces_[left] + tokenizer.pieces_[right];
        if (piece.size() > kLongestPiece) return Parsed::failure("token %zu is longer than %zu bytes", token, kLongestPiece);
        tokenizer.rank_.emplace(key(static_cast<Token>(left), static_cast<Token>(right)), static_cast<Token>(token));
      }
      if (!same_bytes(pieces[token], piece))
        return Parsed::failure("piece %zu of the tokenizer is not what its merge makes", token);
      tokenizer.pieces_.push_back(std::move(piece));
    }
    return tokenizer;
  }

  static Result<Tokenizer> load(const std::filesystem::path& path) {
    auto bytes = read_file(path);
    if (!bytes) return Result<Tokenizer>::failure(bytes.error);
    auto parsed = parse(*bytes);
    if (!parsed) return Result<Tokenizer>::failure("%s: %s", path.c_str(), parsed.error.c_str());
    return parsed;
  }

  std::size_t size() const { return pieces_.size(); }
  std::string_view piece(Token token) const { return pieces_[static_cast<std::size_t>(token)]; }

  std::string decode(std::span<const Token> tokens) const {
    std::string text;
    for (const Token token : tokens) text += piece(token);
    return text;
  }

  // Merges never cross words: a run of ASCII letters with the space before it, or any other byte alone.
  std::vector<Token> encode(std::string_view text) const {
    std::vector<Token> tokens;
    for (std::size_t begin = 0; begin < text.size();) {
      std::size_t end = begin + (text[begin] == ' ' && begin + 1 < text.size() && letter(text[begin + 1]) ? 1 : 0);
      if (letter(text[end])) {
        while (end < text.size() && letter(text[end])) ++end;
      } else {
        ++end;
      }
      encode_word(text.substr(begin, end - begin), tokens);
      begin = end;
    }
    return tokens;
  }

 private:
  static constexpr std::size_t kBytes = 256, kMostTokens = std::size_t{1} << 20, kLongestPiece = 1024;

  static bool letter(char c) { return (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'); }
  static std::uint64_t key(Token left, Token right) {
    return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
  }
  static bool same_bytes(const Json& array, const std::string& piece) {
    if (!array.is_array() || array.size() != piece.size()) return false;
    for (std::size_t i = 0; i < piece.size(); ++i) {
      std::uint64_t byte = 0;
      if (!read_unsigned(array[i], 255, byte) || byte != static_cast<unsigned char>(piece[i])) return false;
    }
    return true;
  }

  // The merge learned first wins, everywhere in the word at once, until none applies. Quadratic in the word; words are
  // short.
  void encode_word(std::string_view word, std::vector<Token>& tokens) const {
    std::vector<Token> ids;
    for (const char byte : word) ids.push_back(static_cast<unsigned char>(byte));
    while (true) {
      Token best = static_cast<Token>(size());
      for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
        const auto merge = rank_.find(key(ids[i], ids[i + 1]));
        if (merge != rank_.end() && merge->second < best) best = merge->second;
      }
      if (best == static_cast<Token>(size())) break;
      std::size_t kept = 0;
      for (std::size_t i = 0; i < ids.size(); ++kept) {
        const auto merge = i + 1 < ids.size() ? rank_.find(key(ids[i], ids[i + 1])) : rank_.end();
        const bool joins = merge != rank_.end() && merge->second == best;
        ids[kept] = joins ? best : ids[i];
        i += joins ? 2 : 1;
      }
      ids.resize(kept);
    }
    tokens.insert(tokens.end(), ids.begin(), ids.end());
  }

  std::vector<std::string> pieces_;
  std::unordered_map<std::uint64_t, Token> rank_;   // pair -> the token it becomes; a smaller token was learned earlier
};

}   // namespace generate
