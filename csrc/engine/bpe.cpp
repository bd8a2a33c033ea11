#include "engine/bpe.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <utility>

#include "engine/error.h"
#include "engine/sentences.h"
#include "engine/unicode_tables.h"
#include "engine/utf8.h"

namespace nanogpt {
namespace {

constexpr std::string_view kEndOfText = "<|endoftext|>";

[[noreturn]] void damaged(const std::string& reason) {
  throw InputError("the bpe tokenizer is damaged: " + reason);
}

// Words are what GPT-2's pattern matches:
// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+

enum Class : uint8_t { kOther, kLetter, kNumber, kSpace, kNotAscii };

constexpr std::array<uint8_t, 256> ascii_classes() {
  std::array<uint8_t, 256> classes{};
  for (size_t i = 0; i < 256; ++i) classes[i] = i < 128 ? kOther : kNotAscii;
  for (size_t i = 'a'; i <= 'z'; ++i) classes[i] = classes[i - 'a' + 'A'] = kLetter;
  for (size_t i = '0'; i <= '9'; ++i) classes[i] = kNumber;
  for (size_t i = '\t'; i <= '\r'; ++i) classes[i] = kSpace;
  classes[' '] = kSpace;
  return classes;
}
constexpr std::array<uint8_t, 256> kAscii = ascii_classes();

// Cuts valid UTF-8 into words.
class WordCutter {
 public:
  explicit WordCutter(std::string_view text) : at_(text.data()), end_(text.data() + text.size()) {}

  // The next word, empty at the end of the text.
  std::string_view next() {
    if (at_ == end_) return {};
    const char* const start = at_;
    if (*at_ == '\'') {
      if (const int length = contraction(); length > 0) {
        at_ += length;
        return {start, static_cast<size_t>(length)};
      }
    }
    int length;
    uint8_t kind = class_at(at_, length);
    if (*at_ == ' ' && end_ - at_ > 1) {
      // A space belongs to the word after it.
      int after_length;
      const uint8_t after = class_at(at_ + 1, after_length);
      if (after != kSpace) {
        ++at_;
        kind = after;
        length = after_length;
      }
    }
    const char* last = at_;
    at_ += length;
    while (at_ != end_ && class_at(at_, length) == kind) {
      last = at_;
      at_ += length;
    }
    // White space before a word leaves its last character to what follows, if it has others.
    if (kind == kSpace && at_ != end_ && last != start) at_ = last;
    return {start, static_cast<size_t>(at_ - start)};
  }

 private:
  int contraction() const {
    const auto comes = [this](char first, char second) {
      return end_ - at_ > 2 && at_[1] == first && at_[2] == second;
    };
    if (end_ - at_ < 2) return 0;
    const char first = at_[1];
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return 2;
    return comes('r', 'e') || comes('v', 'e') || comes('l', 'l') ? 3 : 0;
  }

  uint8_t class_at(const char* at, int& length) {
    const uint8_t kind = kAscii[static_cast<uint8_t>(*at)];
    if (kind != kNotAscii) {
      length = 1;
      return kind;
    }
    const uint32_t code = utf8_valid_step(at, length);
    // A text stays in a range of characters for a while.
    if (code < range_first_ || code >= range_end_) find_range(code);
    return range_class_;
  }

  void find_range(uint32_t code) {
    const auto* const after =
        std::upper_bound(std::begin(kCharacterClasses), std::end(kCharacterClasses), code * 4 + 3);
    const uint32_t entry = after[-1];
    range_first_ = entry / 4;
    range_end_ = after == std::end(kCharacterClasses) ? 0x110000 : *after / 4;
    range_class_ = entry % 4;
  }

  const char* at_;
  const char* const end_;
  uint32_t range_first_ = 0, range_end_ = 0;
  uint8_t range_class_ = 0;
};

// A vocabulary is spelled with a visible character for every byte.

constexpr uint32_t kSymbols = 256 + 68;

constexpr std::array<int16_t, kSymbols> symbol_values() {
  std::array<int16_t, kSymbols> values{};
  for (size_t i = 0; i < kSymbols; ++i) values[i] = -1;
  uint32_t hidden = 256;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool visible = (byte >= 0x21 && byte < 0x7F) || (byte >= 0xA1 && byte != 0xAD);
    values[visible ? byte : hidden++] = static_cast<int16_t>(byte);
  }
  return values;
}
constexpr std::array<int16_t, kSymbols> kSymbolValues = symbol_values();

char byte_of_symbol(uint32_t code) {
  if (code >= kSymbols || kSymbolValues[code] < 0) damaged("a token is not made of bytes");
  return static_cast<char>(kSymbolValues[code]);
}

uint64_t load(const char* at, size_t count) {
  uint64_t word = 0;
  std::memcpy(&word, at, count);
  return word;
}

uint64_t mixed(uint64_t word) {
  word *= 0x9E3779B97F4A7C15u;
  return word ^ (word >> 32);
}

uint32_t hash_of(std::string_view bytes) {
  uint64_t hash = bytes.size();
  const char* at = bytes.data();
  size_t left = bytes.size();
  for (; left >= 8; left -= 8, at += 8) hash = mixed(hash ^ load(at, 8));
  if (left >= 4) {
    hash = mixed(hash ^ (load(at, 4) | load(at + left - 4, 4) << 32));
  } else if (left > 0) {
    const auto byte = [at](size_t i) { return static_cast<uint64_t>(static_cast<uint8_t>(at[i])); };
    hash = mixed(hash ^ (byte(0) | byte(left / 2) << 8 | byte(left - 1) << 16));
  }
  return static_cast<uint32_t>(mixed(hash));
}

// Bytes that grow at the end, up to a limit known before; pages that are not reached cost nothing.
class Bytes {
 public:
  Bytes() = default;
  explicit Bytes(size_t limit) : bytes_(new char[limit]), end_(bytes_.get()) {}
  void push(char byte) { *end_++ = byte; }
  uint32_t size() const { return static_cast<uint32_t>(end_ - bytes_.get()); }
  const char* data() const { return bytes_.get(); }

 private:
  std::unique_ptr<char[]> bytes_;
  char* end_ = nullptr;
};

// Slots, a power of two, of a table with open addressing.
size_t slots_for(size_t entries, double fullest) {
  size_t slots = 16;
  while (static_cast<double>(slots) * fullest < static_cast<double>(entries)) slots *= 2;
  return slots;
}

struct Merge {
  uint32_t rank;
  int32_t made;
};

// What two neighbouring tokens become.
class MergeTable {
 public:
  void reserve(size_t merges) {
    // Most pairs that are asked for are not there; half full, that is seen soon.
    slots_.assign(slots_for(merges, 0.5), Slot{});
    mask_ = slots_.size() - 1;
  }

  // As in the library the last of equal pairs counts.
  void set(int32_t left, int32_t right, Merge merge) {
    size_t at = place(left, right);
    while (slots_[at].left >= 0 && !(slots_[at].left == left && slots_[at].right == right)) {
      at = (at + 1) & mask_;
    }
    slots_[at] = {left, right, merge};
  }

  // Fetches the place of a pair that is soon to be set.
  void prepare(int32_t left, int32_t right) const {
    __builtin_prefetch(&slots_[place(left, right)], 1);
  }

  const Merge* find(int32_t left, int32_t right) const {
    for (size_t at = place(left, right);; at = (at + 1) & mask_) {
      const Slot& slot = slots_[at];
      if (slot.left == left && slot.right == right) return &slot.merge;
      if (slot.left < 0) return nullptr;
    }
  }

 private:
  struct Slot {
    int32_t left = -1, right = -1;
    Merge merge{};
  };
  size_t place(int32_t left, int32_t right) const {
    const uint64_t key = static_cast<uint64_t>(left) << 32 | static_cast<uint32_t>(right);
    return mixed(mixed(key)) & mask_;
  }
  std::vector<Slot> slots_;
  size_t mask_ = 0;
};

template <typename OnCode>
void for_each_code(const std::string& text, const OnCode& on_code) {
  int length;
  for (size_t at = 0; at < text.size(); at += static_cast<size_t>(length)) {
    on_code(utf8_valid_step(text.data() + at, length));
  }
}

[[noreturn]] void refuse_option(const std::string& key) {
  damaged("its option " + key + " is not supported");
}

// Reads an object of which every field is known. on_field(key) consumes the value, or returns false
// for a key that it does not know. A field said twice, an unknown one or a missing required one is
// damage.
template <typename OnField>
void read_object(JsonScanner& json, const std::string& name,
                 std::initializer_list<std::string_view> required, const OnField& on_field) {
  std::vector<std::string> seen;
  const auto has_seen = [&seen](std::string_view key) {
    return std::find(seen.begin(), seen.end(), key) != seen.end();
  };
  if (json.next() != '{') damaged("its " + name + " is missing");
  json.object([&](const std::string& key) {
    if (has_seen(key)) damaged("its " + name + " says " + key + " twice");
    seen.push_back(key);
    if (!on_field(key)) refuse_option(key);
  });
  for (const std::string_view key : required) {
    if (!has_seen(key)) damaged("its " + name + " lacks " + std::string(key));
  }
}

// The settings of the pre-tokenizer, decoder or post-processor "ByteLevel".
struct ByteLevel {
  bool adds_space = true, uses_pattern = true;
};

// Refuses every other kind.
ByteLevel read_byte_level(JsonScanner& json, const std::string& name) {
  ByteLevel settings;
  read_object(json, name, {"type", "add_prefix_space", "trim_offsets"},
              [&](const std::string& key) {
                if (key == "type") {
                  if (json.text() != "ByteLevel") damaged("its " + name + " is not ByteLevel");
                } else if (key == "add_prefix_space") {
                  settings.adds_space = json.flag();
                } else if (key == "use_regex") {
                  settings.uses_pattern = json.flag();
                } else if (key == "trim_offsets") {
                  json.flag();
                } else {
                  return false;
                }
                return true;
              });
  return settings;
}

class BPETokenizer : public Tokenizer {
 public:
  explicit BPETokenizer(JsonScanner& json);

  std::vector<int32_t> encode(std::string_view text) const override;

 private:
  // Two names that a merge puts together; they lie one behind the other.
  struct MergeText {
    uint32_t start, left_length, right_length;
  };
  // Finds ids by their bytes while the tokenizer is built.
  class Names;
  // What encoding needs room for.
  struct Scratch;

  void read_vocabulary(JsonScanner& json);
  void read_merges(JsonScanner& json);
  void read_model(JsonScanner& json);
  void read_added_tokens(JsonScanner& json);
  void settle();

  void append_short_word(std::string_view word, std::vector<int32_t>& ids) const;
  void append_long_word(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const;

  std::array<int32_t, 256> byte_ids_{};
  MergeTable merges_;

  // Used while reading.
  std::optional<int32_t> added_id_;
  std::vector<std::pair<Span, int32_t>> named_;
  Bytes merge_names_;
  std::vector<MergeText> merge_texts_;
};

void BPETokenizer::read_vocabulary(JsonScanner& json) {
  // A byte of a name comes from at least one of the JSON's, an entry from at least six.
  Bytes names(json.left());
  named_.reserve(json.left() / 6);
  uint32_t start = 0;
  json.raw_object([&](uint32_t code) { names.push(byte_of_symbol(code)); },
                  [&] {
                    named_.emplace_back(Span{start, names.size() - start}, json.count());
                    start = names.size();
                  });
  arena_.assign(names.data(), names.size());
}

void BPETokenizer::read_merges(JsonScanner& json) {
  merge_names_ = Bytes(json.left());
  merge_texts_.reserve(json.left() / 8);
  const auto size = [this] { return merge_names_.size(); };
  const auto name = [this](uint32_t code) { merge_names_.push(byte_of_symbol(code)); };
  char form = 0;
  json.array([&] {
    const char type = json.next();
    if (form == 0) form = type;
    if (type != form || (type != '[' && type != '"')) damaged("a merge is not a pair of tokens");
    MergeText merge{size(), 0, 0};
    int parts = 0;
    if (type == '[') {
      json.array([&] {
        json.string(name);
        if (++parts == 1) merge.left_length = size() - merge.start;
      });
    } else {
      // The older form: both with a space between them, which stands in no token, and maybe a line
      // about its version.
      const std::string line = json.text();
      if (line.rfind("#version", 0) == 0) return;
      const size_t space = line.find(' ');
      parts = space == std::string::npos ? 1 : 2;
      for_each_code(line.substr(0, space), name);
      merge.left_length = size() - merge.start;
      if (parts == 2) for_each_code(line.substr(space + 1), name);
    }
    if (parts != 2) damaged("a merge is not a pair of tokens");
    merge.right_length = size() - merge.start - merge.left_length;
    merge_texts_.push_back(merge);
  });
}

void BPETokenizer::read_model(JsonScanner& json) {
  bool is_bpe = false;
  read_object(json, "model", {"type", "vocab", "merges"}, [&](const std::string& key) {
    if (key == "vocab") {
      read_vocabulary(json);
    } else if (key == "merges") {
      read_merges(json);
    } else if (key == "type") {
      is_bpe = json.text() == "BPE";
    } else if (key == "dropout" || key == "unk_token") {
      if (!json.literal("null")) refuse_option(key);
    } else if (key == "continuing_subword_prefix" || key == "end_of_word_suffix") {
      if (!json.literal("null") && !json.text().empty()) refuse_option(key);
    } else if (key == "byte_fallback" || key == "ignore_merges") {
      if (json.flag()) refuse_option(key);
    } else if (key == "fuse_unk") {
      json.flag();
    } else {
      return false;
    }
    return true;
  });
  if (!is_bpe) damaged("its model is not BPE");
}

void BPETokenizer::read_added_tokens(JsonScanner& json) {
  json.array([&] {
    if (added_id_) damaged("it has more than one special token");
    std::string content;
    bool special = false;
    read_object(json, "special token",
                {"content", "id", "special", "single_word", "lstrip", "rstrip", "normalized"},
                [&](const std::string& key) {
                  if (key == "content") {
                    content = json.text();
                  } else if (key == "id") {
                    added_id_ = json.count();
                  } else if (key == "special") {
                    special = json.flag();
                  } else if (key == "single_word" || key == "lstrip" || key == "rstrip" ||
                             key == "normalized") {
                    json.flag();
                  } else {
                    return false;
                  }
                  return true;
                });
    // Any other would be cut out of ordinary text.
    if (content != kEndOfText || !special) {
      damaged("its special token is not " + std::string(kEndOfText));
    }
  });
}

class BPETokenizer::Names {
 public:
  explicit Names(const BPETokenizer& owner, size_t names)
      : arena_(owner.arena_), spans_(owner.spans_), slots_(slots_for(names, 0.8)) {
    mask_ = slots_.size() - 1;
  }

  // The hash of a name; fetches the place where it is soon to be looked for.
  uint32_t prepared(std::string_view bytes) const {
    const uint32_t hash = hash_of(bytes);
    __builtin_prefetch(&slots_[hash & mask_]);
    return hash;
  }

  void add(int32_t id, uint32_t hash) {
    size_t at = hash & mask_;
    while (slots_[at].id >= 0) {
      if (slots_[at].hash == hash && bytes_of(slots_[at].id) == bytes_of(id)) {
        damaged("it names a token twice");
      }
      at = (at + 1) & mask_;
    }
    slots_[at] = {hash, id};
  }

  // -1 where there is none.
  int32_t find(std::string_view bytes) const { return find(bytes, hash_of(bytes)); }
  int32_t find(std::string_view bytes, uint32_t hash) const {
    for (size_t at = hash & mask_; slots_[at].id >= 0; at = (at + 1) & mask_) {
      if (slots_[at].hash == hash && bytes_of(slots_[at].id) == bytes) return slots_[at].id;
    }
    return -1;
  }

  std::string_view bytes_of(int32_t id) const {
    const Span& span = spans_[static_cast<size_t>(id)];
    return {arena_.data() + span.start, span.length};
  }

 private:
  struct Slot {
    uint32_t hash = 0;
    int32_t id = -1;
  };
  const std::string& arena_;
  const std::vector<Span>& spans_;
  std::vector<Slot> slots_;
  size_t mask_;
};

// Ids, byte tokens and merges from what was read.
void BPETokenizer::settle() {
  const size_t count = named_.size();
  if (count > INT32_MAX / 4 || merge_texts_.size() > INT32_MAX / 4) damaged("it is too large");
  spans_.assign(count, {});
  for (const auto& [span, id] : named_) {
    if (span.length == 0) damaged("a token is empty");
    if (static_cast<size_t>(id) >= count || spans_[static_cast<size_t>(id)].length != 0) {
      damaged("its ids are not 0, 1, 2 and so on");
    }
    spans_[static_cast<size_t>(id)] = span;
  }
  Names names(*this, count);
  // Tables of this size do not fit the nearest caches: work is done in batches, whose places in
  // memory are fetched ahead.
  constexpr size_t kBatch = 32;
  for (size_t first = 0; first < count; first += kBatch) {
    const size_t batch = std::min(kBatch, count - first);
    uint32_t hashes[kBatch];
    for (size_t i = 0; i < batch; ++i) {
      hashes[i] = names.prepared(names.bytes_of(static_cast<int32_t>(first + i)));
    }
    for (size_t i = 0; i < batch; ++i) names.add(static_cast<int32_t>(first + i), hashes[i]);
  }

  // The special token is the last one, in the vocabulary or after it.
  const int32_t listed = names.find(kEndOfText);
  const auto end_of_text = static_cast<int32_t>(listed >= 0 ? count - 1 : count);
  if ((listed >= 0 && listed != end_of_text) || (listed < 0 && !added_id_) ||
      (added_id_ && *added_id_ != end_of_text) || end_of_text < 256) {
    damaged("its last token is not " + std::string(kEndOfText));
  }
  for (size_t byte = 0; byte < 256; ++byte) {
    const char name = static_cast<char>(byte);
    byte_ids_[byte] = names.find({&name, 1});
    if (byte_ids_[byte] < 0) {
      damaged("no token stands for the byte " + formatted("0x%02x", static_cast<uint32_t>(byte)));
    }
  }

  const auto found = [](int32_t id) {
    if (id < 0) damaged("a merge names a token that is not in the vocabulary");
    return id;
  };
  merges_.reserve(merge_texts_.size());
  // Merges make new ids in order, so the id after the last one is the first guess.
  int32_t guess = 0;
  for (size_t first = 0; first < merge_texts_.size(); first += kBatch) {
    const size_t batch = std::min(kBatch, merge_texts_.size() - first);
    struct Pair {
      std::string_view left, right;
      uint32_t left_hash, right_hash;
      int32_t left_id, right_id;
    } pairs[kBatch];
    for (size_t i = 0; i < batch; ++i) {
      const MergeText& merge = merge_texts_[first + i];
      Pair& pair = pairs[i];
      pair.left = {merge_names_.data() + merge.start, merge.left_length};
      pair.right = {pair.left.data() + pair.left.size(), merge.right_length};
      pair.left_hash = names.prepared(pair.left);
      pair.right_hash = names.prepared(pair.right);
    }
    for (size_t i = 0; i < batch; ++i) {
      Pair& pair = pairs[i];
      pair.left_id = found(names.find(pair.left, pair.left_hash));
      pair.right_id = found(names.find(pair.right, pair.right_hash));
      merges_.prepare(pair.left_id, pair.right_id);
    }
    for (size_t i = 0; i < batch; ++i) {
      const Pair& pair = pairs[i];
      const std::string_view both(pair.left.data(), pair.left.size() + pair.right.size());
      if (static_cast<size_t>(guess) >= count || names.bytes_of(guess) != both) {
        guess = found(names.find(both));
      }
      merges_.set(pair.left_id, pair.right_id, {static_cast<uint32_t>(first + i), guess});
      ++guess;
    }
  }
  spans_.resize(static_cast<size_t>(end_of_text) + 1);
  spans_.back() = {};
  named_ = {};
  merge_texts_ = {};
  merge_names_ = {};
}

BPETokenizer::BPETokenizer(JsonScanner& json) {
  read_object(json, "description", {"version", "model", "pre_tokenizer", "added_tokens"},
              [&](const std::string& key) {
                if (key == "model") {
                  read_model(json);
                } else if (key == "added_tokens") {
                  read_added_tokens(json);
                } else if (key == "pre_tokenizer") {
                  const ByteLevel settings = read_byte_level(json, "pre-tokenizer");
                  if (settings.adds_space || !settings.uses_pattern) {
                    damaged("it does not split words as GPT-2 does");
                  }
                } else if (key == "decoder" || key == "post_processor") {
                  // These change nothing: ids are left as they are, and their bytes put together.
                  if (!json.literal("null")) read_byte_level(json, key);
                } else if (key == "normalizer" || key == "truncation" || key == "padding") {
                  if (!json.literal("null")) refuse_option(key);
                } else if (key == "version") {
                  if (json.text() != "1.0") damaged("its version is not 1.0");
                } else {
                  return false;
                }
                return true;
              });
  settle();
}

// Up to this many bytes a word is merged by looking at all pairs each time; a longer one has a
// heap.
constexpr size_t kShortWord = 64;

struct BPETokenizer::Scratch {
  struct Symbol {
    int32_t id;
    bool gone;
    size_t before, after;
  };
  struct Candidate {
    uint32_t rank;
    int32_t made;
    size_t at;
    // The heap gives the lowest rank first, and of equal ones the leftmost.
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  std::vector<Symbol> symbols;
  std::vector<Candidate> heap;
};

void BPETokenizer::append_short_word(std::string_view word, std::vector<int32_t>& ids) const {
  constexpr Merge kNone{UINT32_MAX, -1};
  int32_t symbols[kShortWord];
  Merge merges[kShortWord];
  size_t count = word.size();
  const auto merge_at = [&](size_t at) {
    const Merge* const merge = merges_.find(symbols[at], symbols[at + 1]);
    return merge != nullptr ? *merge : kNone;
  };
  for (size_t i = 0; i < count; ++i) symbols[i] = byte_ids_[static_cast<uint8_t>(word[i])];
  for (size_t i = 0; i + 1 < count; ++i) merges[i] = merge_at(i);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (merges[i].rank < merges[best].rank) best = i;
    }
    if (merges[best].made < 0) break;
    symbols[best] = merges[best].made;
    --count;
    for (size_t i = best + 1; i < count; ++i) {
      symbols[i] = symbols[i + 1];
      merges[i - 1] = merges[i];
    }
    if (best > 0) merges[best - 1] = merge_at(best - 1);
    if (best + 1 < count) merges[best] = merge_at(best);
  }
  ids.insert(ids.end(), symbols, symbols + count);
}

void BPETokenizer::append_long_word(std::string_view word, Scratch& scratch,
                                    std::vector<int32_t>& ids) const {
  constexpr size_t kNowhere = SIZE_MAX;
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  symbols.clear();
  heap.clear();
  for (size_t i = 0; i < word.size(); ++i) {
    symbols.push_back({byte_ids_[static_cast<uint8_t>(word[i])], false, i - 1,
                       i + 1 < word.size() ? i + 1 : kNowhere});
  }
  const auto candidate_at = [&](size_t at) {
    const Merge* const merge = merges_.find(symbols[at].id, symbols[symbols[at].after].id);
    if (merge == nullptr) return false;
    heap.push_back({merge->rank, merge->made, at});
    return true;
  };
  for (size_t i = 0; i + 1 < word.size(); ++i) candidate_at(i);
  std::make_heap(heap.begin(), heap.end());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end());
    const Scratch::Candidate top = heap.back();
    heap.pop_back();
    auto& left = symbols[top.at];
    if (left.gone || left.after == kNowhere) continue;
    auto& right = symbols[left.after];
    // Other merges may have changed the pair since.
    const Merge* const merge = merges_.find(left.id, right.id);
    if (merge == nullptr || merge->made != top.made) continue;
    left.id = top.made;
    right.gone = true;
    left.after = right.after;
    if (left.after != kNowhere) {
      symbols[left.after].before = top.at;
      if (candidate_at(top.at)) std::push_heap(heap.begin(), heap.end());
    }
    if (left.before != kNowhere && candidate_at(left.before)) {
      std::push_heap(heap.begin(), heap.end());
    }
  }
  for (size_t i = 0; i != kNowhere; i = symbols[i].after) ids.push_back(symbols[i].id);
}

std::vector<int32_t> BPETokenizer::encode(std::string_view text) const {
  if (const size_t good = utf8_valid_prefix(text); good != text.size()) throw_not_utf8(text, good);
  std::vector<int32_t> ids;
  ids.reserve(text.size() / 3 + 8);
  // Words come again: where one stands in the text, and where its ids stand.
  struct Known {
    const char* word = nullptr;
    size_t ids_at = 0;
    uint32_t length = 0, count = 0;
  };
  size_t slots = text.size() < 1024 ? 0 : 256;
  while (slots > 0 && slots < 16384 && slots < text.size() / 16) slots *= 2;
  std::vector<Known> known(slots);
  Scratch scratch;
  WordCutter cutter(text);
  for (std::string_view word = cutter.next(); !word.empty(); word = cutter.next()) {
    if (word.size() == 1) {
      ids.push_back(byte_ids_[static_cast<uint8_t>(word[0])]);
      continue;
    }
    if (word.size() > kShortWord) {
      append_long_word(word, scratch, ids);
      continue;
    }
    Known* const seen = slots > 0 ? &known[hash_of(word) & (slots - 1)] : nullptr;
    if (seen != nullptr && std::string_view(seen->word, seen->length) == word) {
      const size_t old_size = ids.size();
      ids.resize(old_size + seen->count);
      std::copy_n(ids.begin() + static_cast<std::ptrdiff_t>(seen->ids_at), seen->count,
                  ids.begin() + static_cast<std::ptrdiff_t>(old_size));
      continue;
    }
    const size_t ids_at = ids.size();
    append_short_word(word, ids);
    if (seen != nullptr) {
      *seen = {word.data(), ids_at, static_cast<uint32_t>(word.size()),
               static_cast<uint32_t>(ids.size() - ids_at)};
    }
  }
  return ids;
}

}  // namespace

std::unique_ptr<Tokenizer> bpe_tokenizer(JsonScanner& json) {
  return std::make_unique<BPETokenizer>(json);
}

}  // namespace nanogpt
