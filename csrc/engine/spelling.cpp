// Nearly always every character of a term is a token, or each of its bytes is. Where one is not,
// the term may still come about in pieces (" gene", "tic"), possibly beginning and ending inside a
// token and with a character divided between two. That is a search over (characters that are
// written, bytes of the next one) with the tokens as its steps.
#include "engine/spelling.h"

#include <algorithm>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "engine/letters.h"
#include "engine/utf8.h"

namespace nanogpt {
namespace {

constexpr uint32_t kReplaced = 0xFFFD;

using Place = std::pair<size_t, std::string>;  // characters that are written, bytes of the next

std::string utf8_of(uint32_t code) {
  std::string bytes;
  append_utf8(bytes, code);
  return bytes;
}

// Where `bytes` lead after the last byte of `from`, or nothing where the term does not go on so.
// A term is complete with what is no letter behind it; the end of the text is none.
std::optional<Place> place_after(const std::vector<uint32_t>& term, const Place& from,
                                 std::string_view bytes) {
  std::string text = from.second;
  text += bytes;
  size_t written = from.first;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    const Utf8Step step = utf8_step(at, end);
    // A token without bytes ends the text, and with it what is cut.
    if (step.kind == Utf8Step::cut && !bytes.empty()) break;
    const uint32_t code = step.kind == Utf8Step::character ? folded(step.code) : kReplaced;
    if (written == term.size()) {
      if (is_word_character(code)) return std::nullopt;
      return Place(written, "");
    }
    if (code != term[written]) return std::nullopt;
    ++written;
    at += step.length;
  }
  if (bytes.empty() && written < term.size()) return std::nullopt;
  return Place(written, std::string(at, end));
}

// Whether the character can begin with the bytes. U+FFFD can: bytes that go on wrongly become it.
bool begins(uint32_t code, const std::string& bytes) {
  if (bytes.empty() || code == kReplaced) return true;
  for (const uint32_t form : unfolded(code)) {
    if (utf8_of(form).compare(0, bytes.size(), bytes) == 0) return true;
  }
  return false;
}

}  // namespace

Speller::Speller(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    const std::string_view bytes = tokenizer.bytes_of(id);
    if (bytes.size() == 1) bytes_[static_cast<uint8_t>(bytes.front())] = true;
    if (bytes.empty() || bytes.size() > 4) continue;
    const Utf8Step step = utf8_step(bytes.data(), bytes.data() + bytes.size());
    if (step.kind == Utf8Step::character && step.length == bytes.size()) {
      characters_.push_back(step.code);
    }
  }
  std::sort(characters_.begin(), characters_.end());
}

bool Speller::can_write(const std::vector<uint32_t>& term) const {
  const bool plain = std::all_of(term.begin(), term.end(),
                                 [this](uint32_t character) { return has_character(character); });
  return plain || can_write_in_pieces(term);
}

bool Speller::has_character(uint32_t folded) const {
  for (const uint32_t form : unfolded(folded)) {
    if (std::binary_search(characters_.begin(), characters_.end(), form)) return true;
    const std::string bytes = utf8_of(form);
    if (std::all_of(bytes.begin(), bytes.end(),
                    [this](char byte) { return bytes_[static_cast<uint8_t>(byte)]; })) {
      return true;
    }
  }
  return false;
}

bool Speller::can_write_in_pieces(const std::vector<uint32_t>& term) const {
  std::set<Place> seen;
  std::vector<Place> left;
  bool complete = false;
  const auto come_to = [&](const std::optional<Place>& place) {
    if (!place) return;
    complete = complete || place->first == term.size();
    if (complete || place->first + place->second.size() == 0) return;
    if (begins(term[place->first], place->second) && seen.insert(*place).second) {
      left.push_back(*place);
    }
  };
  // The term begins at a token's beginning, or inside of it after what is no letter.
  for (int32_t id = 0; id < tokenizer_.vocab_size() && !complete; ++id) {
    std::string_view rest = tokenizer_.bytes_of(id);
    bool boundary = true;
    while (!rest.empty() && !complete) {
      if (boundary) come_to(place_after(term, {}, rest));
      const Utf8Step step = utf8_step(rest.data(), rest.data() + rest.size());
      boundary = step.kind != Utf8Step::character || !is_word_character(step.code);
      rest.remove_prefix(step.length);
    }
  }
  while (!left.empty() && !complete) {
    const Place from = std::move(left.back());
    left.pop_back();
    for (int32_t id = 0; id < tokenizer_.vocab_size() && !complete; ++id) {
      come_to(place_after(term, from, tokenizer_.bytes_of(id)));
    }
  }
  return complete;
}

}  // namespace nanogpt
