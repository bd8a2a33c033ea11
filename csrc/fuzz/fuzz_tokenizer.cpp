// Hostile descriptions and texts: the tokenizers, the UTF-8 stream and the stop texts.
//
// The input is a description, a zero byte, and a text; without a zero byte both are the same.

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/error.h"
#include "engine/text.h"
#include "engine/tokenizer.h"
#include "engine/utf8.h"
#include "fuzz/fuzzing.h"

namespace fuzzing {

const std::vector<std::string> pieces = {
    "null",
    "false",
    "true",
    "-1",
    "1e9",
    "99999999999",
    "\"",
    "[",
    "{",
    "}",
    ",",
    "\\ud",
    "\\u0",
    "\xF0\x9F",
    "{\"kind\":\"byte\"}",
    "{\"kind\":\"char\",\"characters\":\"ab\"}",
    "\"kind\":\"record\",\"fields\":[[\"a\",[\"b\"]]]",
    "\x1e",
    "\x1f",
};

namespace {

// Whether the description is taken.
bool try_tokenizer(std::string_view description, std::string_view text) {
  std::unique_ptr<nanogpt::Tokenizer> tokenizer;
  try {
    tokenizer = nanogpt::Tokenizer::from_json(description);
  } catch (const nanogpt::InputError&) {
    return false;
  }
  try {
    must(tokenizer->bytes_of(tokenizer->end_of_text_id()).empty(), "the special token has bytes");
    const std::vector<int32_t> ids = tokenizer->encode(text);
    std::string bytes;
    for (const int32_t id : ids) bytes += tokenizer->bytes_of(id);
    // A merge may make the special token, whose bytes are left out.
    const bool special = bytes.size() != text.size();
    must(special || bytes == text, "the ids' bytes are not the text");
    const std::string decoded = tokenizer->decode(ids);
    must(nanogpt::utf8_valid_prefix(decoded) == decoded.size(), "decode gives what is not UTF-8");
  } catch (const nanogpt::InputError&) {
    // The text has characters that the vocabulary lacks, or is not UTF-8.
  }
  return true;
}

void try_streams(std::string_view text) {
  nanogpt::Utf8Stream whole, split;
  std::string at_once = whole.feed(text);
  at_once += whole.flush();
  std::string piecewise;
  for (const char byte : text) piecewise += split.feed({&byte, 1});
  piecewise += split.flush();
  must(at_once == piecewise, "the UTF-8 stream depends on where it is split");

  // Characters at the front of the text are the stop text, what follows is watched.
  size_t edge = at_once.size() < 4 ? at_once.size() : 4;
  while (edge < at_once.size() && (at_once[edge] & 0xC0) == 0x80) ++edge;
  const std::string stop = at_once.substr(0, edge), rest = at_once.substr(edge);
  nanogpt::StopText watch({stop});
  std::string given = watch.feed(rest);
  given += watch.flush();
  const size_t expected = stop.empty() ? std::string::npos : rest.find(stop);
  must(watch.found() == (expected != std::string::npos), "a stop text is missed or made up");
  must(given == rest.substr(0, expected), "a stop text ends the text at the wrong place");
}

}  // namespace

bool accepts(const uint8_t* data, size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const size_t zero = input.find('\0');
  const std::string_view text = zero == std::string_view::npos ? input : input.substr(zero + 1);
  const bool taken = try_tokenizer(input.substr(0, zero), text);
  try_streams(text);
  return taken;
}

void mend(Bytes&, Random&) {}

}  // namespace fuzzing
