// Text to token ids and back, equal to nanogpt/tokenizer.py on every input.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace nanogpt {

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  // From the JSON of Python's Tokenizer.to_dict. Throws InputError where it is damaged.
  static std::unique_ptr<Tokenizer> from_json(std::string_view json);

  // Ids of UTF-8 text. Throws InputError for a character that the vocabulary lacks (the sentence
  // of Python's UnknownCharacterError, position in characters) and for bytes that are not UTF-8;
  // the byte tokenizer takes any bytes.
  virtual std::vector<int32_t> encode(std::string_view text) const = 0;

  // V, the special token included; it is the last id, and its bytes are empty.
  int32_t vocab_size() const { return static_cast<int32_t>(spans_.size()); }
  int32_t end_of_text_id() const { return vocab_size() - 1; }
  // Raw bytes of an id. Throws std::out_of_range for an id outside the vocabulary.
  std::string_view bytes_of(int32_t id) const {
    const Span& span = spans_.at(static_cast<size_t>(id));
    return {arena_.data() + span.start, span.length};
  }
  // UTF-8 text of ids; bytes that are not UTF-8 become U+FFFD as in Python's "replace". Throws
  // std::out_of_range for an id outside the vocabulary.
  std::string decode(const std::vector<int32_t>& ids) const;

 protected:
  // Where an id's bytes lie in the arena.
  struct Span {
    uint32_t start = 0, length = 0;
  };
  std::string arena_;
  std::vector<Span> spans_;
};

}  // namespace nanogpt
