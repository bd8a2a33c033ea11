#include "engine/tokenizer.h"

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>

#include "engine/bpe.h"
#include "engine/error.h"
#include "engine/json_scanner.h"
#include "engine/sentences.h"
#include "engine/utf8.h"

namespace nanogpt {
namespace {

class CharTokenizer : public Tokenizer {
 public:
  explicit CharTokenizer(std::vector<uint32_t> codes) {
    std::sort(codes.begin(), codes.end());
    if (codes.empty() || std::adjacent_find(codes.begin(), codes.end()) != codes.end()) {
      throw InputError("a character vocabulary needs characters, each of them once");
    }
    for (const uint32_t code : codes) {
      if (code >= 0xD800 && code < 0xE000) {
        throw InputError(formatted("U+%04X", code) +
                         " is half of a character and cannot be in a text");
      }
    }
    page_of_.fill(0);
    pages_.emplace_back().fill(-1);
    for (const uint32_t code : codes) {
      uint16_t& page = page_of_[code / kPage];
      if (page == 0) {
        page = static_cast<uint16_t>(pages_.size());
        pages_.emplace_back().fill(-1);
      }
      pages_[page][code % kPage] = static_cast<int32_t>(spans_.size());
      const auto start = static_cast<uint32_t>(arena_.size());
      append_utf8(arena_, code);
      spans_.push_back({start, static_cast<uint32_t>(arena_.size()) - start});
    }
    spans_.push_back({0, 0});
  }

  std::vector<int32_t> encode(std::string_view text) const override {
    std::vector<int32_t> ids;
    ids.reserve(text.size());
    const char* const begin = text.data();
    const char* const end = begin + text.size();
    for (const char* at = begin; at != end;) {
      const Utf8Step step = utf8_step(at, end);
      if (step.kind != Utf8Step::character) {
        throw_not_utf8(text, static_cast<size_t>(at - begin));
      }
      const int32_t id = pages_[page_of_[step.code / kPage]][step.code % kPage];
      if (id < 0) {
        throw InputError("the character " + python_repr(step.code) + " (U+" +
                         formatted("%04X", step.code) + ") at position " + with_commas(ids.size()) +
                         " is not in the model's vocabulary");
      }
      ids.push_back(id);
      at += step.length;
    }
    return ids;
  }

 private:
  static constexpr uint32_t kPage = 256;
  // Page 0 holds no character; the others are made where there is one.
  std::array<uint16_t, 0x110000 / kPage> page_of_;
  std::vector<std::array<int32_t, kPage>> pages_;
};

class ByteTokenizer : public Tokenizer {
 public:
  ByteTokenizer() {
    for (uint32_t value = 0; value < 256; ++value) {
      arena_ += static_cast<char>(value);
      spans_.push_back({value, 1});
    }
    spans_.push_back({0, 0});
  }

  std::vector<int32_t> encode(std::string_view text) const override {
    const auto* const first = reinterpret_cast<const uint8_t*>(text.data());
    return {first, first + text.size()};
  }
};

}  // namespace

std::unique_ptr<Tokenizer> Tokenizer::from_json(std::string_view text) {
  JsonScanner json(text, "the tokenizer's description");
  const auto unknown = [] {
    return InputError("the tokenizer's description is damaged or of an unknown kind");
  };
  // Places in it are kept in 32 bits.
  if (text.size() > INT32_MAX || json.next() != '{') throw unknown();
  std::optional<std::string> kind;
  std::optional<std::vector<uint32_t>> characters;
  const char* bpe_at = nullptr;
  std::unique_ptr<Tokenizer> bpe;
  json.object([&](const std::string& key) {
    const bool again = (key == "kind" && kind) || (key == "characters" && characters) ||
                       (key == "tokenizer" && bpe_at != nullptr);
    if (again) throw unknown();
    const char type = json.next();
    if (key == "kind" && type == '"') {
      kind = json.text();
    } else if (key == "characters" && type == '"') {
      characters.emplace();
      json.string([&](uint32_t code) { characters->push_back(code); });
    } else if (key == "tokenizer" && type == '{') {
      bpe_at = json.tell();
      // In the canonical order the kind has come already, and once over the text is enough.
      if (kind == "bpe") {
        bpe = bpe_tokenizer(json);
      } else {
        json.skip();
      }
    } else {
      json.skip();
    }
  });
  json.finish();
  if (kind == "byte") return std::make_unique<ByteTokenizer>();
  if (kind == "char" && characters) return std::make_unique<CharTokenizer>(std::move(*characters));
  if (kind != "bpe" || bpe_at == nullptr) throw unknown();
  if (bpe == nullptr) {
    json.seek(bpe_at);
    bpe = bpe_tokenizer(json);
  }
  return bpe;
}

std::string Tokenizer::decode(const std::vector<int32_t>& ids) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      throw std::out_of_range("token " + std::to_string(id) + " is outside the vocabulary of " +
                              std::to_string(vocab_size()));
    }
    bytes += bytes_of(id);
  }
  if (utf8_valid_prefix(bytes) == bytes.size()) return bytes;
  std::string out;
  append_replaced(out, bytes, true);
  return out;
}

}  // namespace nanogpt
