// Term rewards are the differences of a potential:
//
//   reward(id) = potential(text + id) - potential(text)
//   potential  = number of distinct terms matched so far + progress of the match under way
//
// so they add up over a text, and what was given for the beginning of a term is taken back when the
// text turns away from it: there is nothing to gain from beginning terms over and over, and a term
// counts once however often it comes. The progress is the larger of
//   - depth / (length + 1) for the shortest uncounted term that the text's end can still become,
//     where the last step is the character that ends the word ("gene" may go on as "general");
//   - what is certain if the text turns away now: the shorter term that stands complete inside
//     ("gene " on the way to "gene therapy"), and the progress of what is left after it.
//
// Matching is that of the expression (?<!\w)(?:t1|t2|...)(?!\w) over the new text, longer terms
// first, leftmost and without overlaps, after folding case one character to one (there is no
// normalisation, and "ss" is not "ß"). It runs as an automaton over characters: a trie of the
// terms, the state `kInWord` (inside a word that matches nothing), and for every node what happens
// when the text turns away from it. The beginning of the new text and a token without bytes (end of
// text) are boundaries; bytes that are not UTF-8 are U+FFFD, as in decoded text.
//
// Candidates: from `kRoot` and `kInWord` only the "sprouting" tokens lead anywhere, and these are
// known once for all. From any other state a token whose first character leads nowhere is worth
// what turning away is worth, plus what it is worth from `kRoot` or `kInWord`; only tokens whose
// first character goes on (after a space: whose first two do) are walked one by one.
#include "engine/rewards.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <map>
#include <string_view>
#include <utility>

#include "engine/error.h"
#include "engine/letters.h"
#include "engine/spelling.h"

namespace nanogpt {
namespace {

constexpr uint32_t kReplacement = 0xFFFD;
// Characters that no term holds: the end of a text, any other letter, anything else.
constexpr uint32_t kEnd = 0x110000, kOtherLetter = 0x110001, kOther = 0x110002;

bool is_word(uint32_t code) { return code < kEnd ? is_word_character(code) : code == kOtherLetter; }

// An unfinished UTF-8 character.
struct Unfinished {
  uint32_t code = 0;
  uint8_t needed = 0;                     // bytes that are missing
  uint8_t lowest = 0x80, highest = 0xBF;  // range of the next one
  bool goes_on_with(uint8_t byte) const { return needed != 0 && byte >= lowest && byte <= highest; }
};

// Feeds a byte; what is not UTF-8 becomes U+FFFD exactly as CPython's errors="replace" does it.
template <class Take>
void decode(Unfinished& held, uint8_t byte, Take&& take) {
  if (held.needed != 0) {
    if (held.goes_on_with(byte)) {
      held.code = held.code << 6 | (byte & 0x3Fu);
      held.lowest = 0x80, held.highest = 0xBF;
      if (--held.needed == 0) take(held.code);
      return;
    }
    held = Unfinished();
    take(kReplacement);
  }
  if (byte < 0x80) {
    take(static_cast<uint32_t>(byte));
  } else if (byte >= 0xC2 && byte <= 0xDF) {
    held = {byte & 0x1Fu, 1, 0x80, 0xBF};
  } else if (byte >= 0xE0 && byte <= 0xEF) {
    held = {byte & 0x0Fu, 2, static_cast<uint8_t>(byte == 0xE0 ? 0xA0 : 0x80),
            static_cast<uint8_t>(byte == 0xED ? 0x9F : 0xBF)};
  } else if (byte >= 0xF0 && byte <= 0xF4) {
    held = {byte & 0x07u, 3, static_cast<uint8_t>(byte == 0xF0 ? 0x90 : 0x80),
            static_cast<uint8_t>(byte == 0xF4 ? 0x8F : 0xBF)};
  } else {
    take(kReplacement);
  }
}

std::string utf8_of(uint32_t code) {
  if (code < 0x80) return {static_cast<char>(code)};
  const int tail = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
  const uint32_t lead = tail == 1 ? 0xC0 : tail == 2 ? 0xE0 : 0xF0;
  std::string out;
  out.push_back(static_cast<char>(lead | code >> (6 * tail)));
  for (int i = tail - 1; i >= 0; --i) {
    out.push_back(static_cast<char>(0x80 | (code >> (6 * i) & 0x3F)));
  }
  return out;
}

// The characters of a text that has to be UTF-8.
std::vector<uint32_t> characters_of(std::string_view text, const char* what) {
  std::vector<uint32_t> codes;
  std::string again;
  Unfinished held;
  for (const char byte : text) {
    decode(held, static_cast<uint8_t>(byte), [&](uint32_t code) {
      codes.push_back(code);
      again += utf8_of(code);
    });
  }
  if (again != text) throw InputError(std::string(what) + " are not valid UTF-8");
  return codes;
}

class TokenReward : public Reward {
 public:
  explicit TokenReward(std::vector<double> values) : values_(std::move(values)) {}
  size_t vocab_size() const override { return values_.size(); }
  const double* of_candidates() override { return values_.data(); }
  void advance(int32_t id) override { (void)values_.at(static_cast<size_t>(id)); }
  std::unique_ptr<Reward> clone() const override { return std::make_unique<TokenReward>(*this); }

 private:
  std::vector<double> values_;
};

class SumReward : public Reward {
 public:
  explicit SumReward(std::vector<WeightedReward> parts)
      : parts_(std::move(parts)), sum_(parts_.front().reward->vocab_size()) {}
  size_t vocab_size() const override { return sum_.size(); }
  const double* of_candidates() override {
    std::fill(sum_.begin(), sum_.end(), 0.0);
    for (const WeightedReward& part : parts_) {
      const double* values = part.reward->of_candidates();
      for (size_t i = 0; i < sum_.size(); ++i) sum_[i] += part.weight * values[i];
    }
    return sum_.data();
  }
  void advance(int32_t id) override {
    for (const WeightedReward& part : parts_) part.reward->advance(id);
  }
  std::unique_ptr<Reward> clone() const override {
    std::vector<WeightedReward> parts;
    for (const WeightedReward& part : parts_) parts.push_back({part.reward->clone(), part.weight});
    return std::make_unique<SumReward>(std::move(parts));
  }

 private:
  std::vector<WeightedReward> parts_;
  std::vector<double> sum_;
};

bool ends_with(std::string_view text, std::string_view end) {
  return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

std::vector<double> rewards_of_characters(const Tokenizer& tokenizer,
                                          const std::string& characters) {
  std::map<uint32_t, bool> wanted;
  for (const uint32_t code : characters_of(characters, "the characters to reward")) {
    wanted.emplace(code, false);
  }
  if (wanted.empty()) throw InputError("there are no characters to reward");
  std::vector<double> rewards(static_cast<size_t>(tokenizer.vocab_size()), 0.0);
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    Unfinished held;
    uint32_t last = kEnd;
    for (const char byte : tokenizer.bytes_of(id)) {
      decode(held, static_cast<uint8_t>(byte), [&](uint32_t code) { last = code; });
    }
    const auto found = held.needed ? wanted.end() : wanted.find(last);
    // Bytes that are no character are not the character U+FFFD.
    if (found == wanted.end() || !ends_with(tokenizer.bytes_of(id), utf8_of(last))) continue;
    found->second = true;
    rewards[static_cast<size_t>(id)] = 1.0;
  }
  for (const auto& [code, found] : wanted) {
    if (!found) {
      throw InputError("no token of the model's vocabulary ends with the character '" +
                       utf8_of(code) + "', so it cannot be rewarded");
    }
  }
  return rewards;
}

constexpr int32_t kRoot = 0;     // after a boundary, on the way to no term
constexpr int32_t kInWord = -1;  // after a letter, on the way to no term
constexpr size_t kLongestTerm = 1000;

// The trie of the terms and the potential of its nodes.
class Matcher {
 public:
  Matcher(const std::vector<std::string>& terms, const Speller& speller) {
    nodes_.emplace_back();
    std::vector<std::map<uint32_t, int32_t>> children(1);
    for (const std::string& term : terms) {
      std::vector<uint32_t> codes = characters_of(term, "the terms to reward");
      if (codes.empty()) throw InputError("one of the terms to reward is empty");
      if (codes.size() > kLongestTerm) {
        throw InputError("one of the terms to reward has " + std::to_string(codes.size()) +
                         " characters; the longest allowed has " + std::to_string(kLongestTerm));
      }
      for (uint32_t& code : codes) code = folded(code);
      if (!speller.can_write(codes)) {
        throw InputError("the term '" + term +
                         "' cannot be written with the model's vocabulary, so it cannot be "
                         "rewarded");
      }
      int32_t node = kRoot;
      for (size_t depth = 1; depth <= codes.size(); ++depth) {
        const uint32_t code = codes[depth - 1];
        const auto place = children[index(node)].emplace(code, static_cast<int32_t>(nodes_.size()));
        if (place.second) {
          Node fresh;
          fresh.parent = node;
          fresh.code = code;
          fresh.depth = static_cast<int32_t>(depth);
          nodes_.push_back(fresh);
          children.emplace_back();
        }
        node = place.first->second;
      }
      if (at(node).term < 0) at(node).term = term_count_++;
    }
    if (term_count_ == 0) throw InputError("there are no terms to reward");
    for (size_t i = 0; i < nodes_.size(); ++i) {
      nodes_[i].first_edge = edges_.size();
      for (const auto& [code, child] : children[i]) edges_.push_back({code, child});
      nodes_[i].end_edge = edges_.size();
    }
    by_depth_.resize(nodes_.size());
    for (size_t i = 0; i < nodes_.size(); ++i) by_depth_[i] = static_cast<int32_t>(i);
    std::stable_sort(by_depth_.begin(), by_depth_.end(),
                     [this](int32_t a, int32_t b) { return at(a).depth < at(b).depth; });
    // What is left of a node is shorter than the node, so its own turning away is already known.
    for (const int32_t node : by_depth_) {
      if (node != kRoot) turn_away_of(node);
    }
  }

  struct Edge {
    uint32_t code;
    int32_t child;
  };

  size_t size() const { return nodes_.size(); }
  int32_t terms() const { return term_count_; }
  const std::vector<Edge>& edges() const { return edges_; }

  // The state after a folded character; `match` is told the terms that are now certain.
  template <class Match>
  int32_t feed(int32_t state, uint32_t code, Match&& match) const {
    while (state != kInWord) {
      const int32_t child = child_of(state, code);
      if (child != kRoot) return child;
      if (state == kRoot) break;
      state = turn_away(state, is_word(code), match);
    }
    return is_word(code) ? kInWord : kRoot;
  }

  // Turns away until the text is on the way to nothing: `kRoot` or `kInWord`.
  template <class Match>
  int32_t abandon(int32_t state, bool before_letter, Match&& match) const {
    while (state > kRoot) state = turn_away(state, before_letter, match);
    return state;
  }

  // Calls take(edge) for every character with which some match under way can go on.
  template <class Take>
  void for_each_way_on(int32_t state, Take&& take) const {
    while (state > kRoot) {
      const Node& node = at(state);
      for (size_t e = node.first_edge; e < node.end_edge; ++e) take(edges_[e]);
      state = node.left;
    }
  }

  // potential[node] while the terms in `counted` are counted; `shortest` is room for it.
  void potentials(const std::vector<uint8_t>& counted, std::vector<int32_t>& shortest,
                  std::vector<double>& potential) const {
    constexpr int32_t kNone = std::numeric_limits<int32_t>::max();
    std::fill(shortest.begin(), shortest.end(), kNone);
    for (size_t i = nodes_.size(); i-- > 1;) {  // children come after their parents
      const Node& node = nodes_[i];
      if (node.term >= 0 && !counted[index(node.term)]) shortest[i] = node.depth;
      int32_t& above = shortest[index(node.parent)];
      above = std::min(above, shortest[i]);
    }
    potential[kRoot] = 0.0;
    for (const int32_t i : by_depth_) {
      if (i == kRoot) continue;
      const Node& node = at(i);
      double certain = node.left > kRoot ? potential[index(node.left)] : 0.0;
      for (size_t m = node.first_match; m < node.end_match; ++m) {
        // A term may stand more than once in what is certain.
        bool again = false;
        for (size_t k = node.first_match; k < m; ++k) again |= matches_[k] == matches_[m];
        certain += !again && !counted[index(matches_[m])];
      }
      double progress = 0.0;
      if (shortest[index(i)] != kNone) {
        progress = static_cast<double>(node.depth) / (static_cast<double>(shortest[index(i)]) + 1);
      }
      potential[index(i)] = std::max(progress, certain);
    }
  }

 private:
  struct Node {
    int32_t parent = kRoot;
    uint32_t code = 0;
    int32_t depth = 0;
    int32_t term = -1;
    size_t first_edge = 0, end_edge = 0;
    // Turning away: the terms that are then certain, and the state that is left.
    size_t first_match = 0, end_match = 0;
    int32_t left = kRoot;
  };

  static size_t index(int32_t i) { return static_cast<size_t>(i); }
  Node& at(int32_t node) { return nodes_[index(node)]; }
  const Node& at(int32_t node) const { return nodes_[index(node)]; }

  int32_t child_of(int32_t node, uint32_t code) const {
    const Edge* begin = edges_.data() + at(node).first_edge;
    const Edge* end = edges_.data() + at(node).end_edge;
    const Edge* edge = std::lower_bound(
        begin, end, code, [](const Edge& e, uint32_t value) { return e.code < value; });
    return edge != end && edge->code == code ? edge->child : kRoot;
  }

  template <class Match>
  int32_t turn_away(int32_t state, bool before_letter, Match&& match) const {
    const Node& node = at(state);
    if (node.term >= 0 && !before_letter) {
      match(node.term);
      return is_word(node.code) ? kInWord : kRoot;
    }
    for (size_t m = node.first_match; m < node.end_match; ++m) match(matches_[m]);
    return node.left;
  }

  void turn_away_of(int32_t node) {
    std::vector<int32_t> path;
    for (int32_t i = node; i != kRoot; i = at(i).parent) path.push_back(i);
    std::reverse(path.begin(), path.end());
    std::vector<uint32_t> codes;
    for (const int32_t i : path) codes.push_back(at(i).code);
    // The longest term inside that a boundary follows; without one the first character is given up.
    size_t used = 1;
    int32_t term = -1;
    for (size_t length = 1; length < codes.size(); ++length) {
      if (at(path[length - 1]).term >= 0 && !is_word(codes[length])) {
        used = length;
        term = at(path[length - 1]).term;
      }
    }
    std::vector<int32_t> found;
    if (term >= 0) found.push_back(term);
    int32_t state = is_word(codes[used - 1]) ? kInWord : kRoot;
    for (size_t i = used; i < codes.size(); ++i) {
      state = feed(state, codes[i], [&](int32_t t) { found.push_back(t); });
    }
    Node& it = at(node);
    it.first_match = matches_.size();
    matches_.insert(matches_.end(), found.begin(), found.end());
    it.end_match = matches_.size();
    it.left = state;
  }

  std::vector<Node> nodes_;
  std::vector<Edge> edges_;
  std::vector<int32_t> matches_;
  std::vector<int32_t> by_depth_;
  int32_t term_count_ = 0;
};

// What a token's first character is.
enum Kind : uint8_t { kLetter, kNotLetter, kPart, kNothing };

struct Token {
  size_t first_code = 0, end_code = 0;  // its whole characters, folded
  int32_t label = -1, second_label = -1;
  Kind kind = kNothing, second_kind = kNothing;
};

// Terms and the vocabulary that they are written with: what does not change along a text.
class Vocabulary {
 public:
  Vocabulary(const Tokenizer& tokenizer, const std::vector<std::string>& terms)
      : tokenizer(tokenizer), matcher(terms, Speller(tokenizer)) {
    for (const Matcher::Edge& edge : matcher.edges()) labels.push_back(edge.code);
    std::sort(labels.begin(), labels.end());
    labels.erase(std::unique(labels.begin(), labels.end()), labels.end());
    starting_with.resize(labels.size());
    const int32_t vocab_size = tokenizer.vocab_size();
    tokens.resize(static_cast<size_t>(vocab_size));
    kinds.resize(tokens.size());
    for (int32_t id = 0; id < vocab_size; ++id) read_token(id);
  }

  int32_t label_of(uint32_t code) const {
    const auto place = std::lower_bound(labels.begin(), labels.end(), code);
    return place != labels.end() && *place == code ? static_cast<int32_t>(place - labels.begin())
                                                   : -1;
  }

  // The state after a token; `match` is told the terms that are now certain.
  template <class Match>
  int32_t walk(int32_t state, const Token& token, Match&& match) const {
    for (size_t i = token.first_code; i < token.end_code; ++i) {
      state = matcher.feed(state, codes[i], match);
    }
    return state;
  }

  const Tokenizer& tokenizer;
  Matcher matcher;
  std::vector<Token> tokens;
  std::vector<uint8_t> kinds;
  std::vector<uint32_t> codes;
  std::vector<uint32_t> labels;  // the characters of the terms
  std::vector<std::vector<int32_t>> starting_with;
  std::vector<int32_t> continuing;  // tokens that begin in the middle of a character
  // Tokens that lead somewhere from kRoot, and from kInWord.
  std::array<std::vector<int32_t>, 2> sprouting;

 private:
  void read_token(int32_t id) {
    Token& token = tokens[static_cast<size_t>(id)];
    const std::string_view bytes = tokenizer.bytes_of(id);
    token.first_code = codes.size();
    Unfinished held;
    for (const char byte : bytes) {
      decode(held, static_cast<uint8_t>(byte),
             [this](uint32_t code) { codes.push_back(folded(code)); });
    }
    token.end_code = codes.size();
    const size_t count = token.end_code - token.first_code;
    const uint32_t* own = codes.data() + token.first_code;
    token.kind = bytes.empty() ? kNothing : kPart;
    token.second_kind = kPart;
    if (count > 0) {
      token.kind = is_word(own[0]) ? kLetter : kNotLetter;
      token.label = label_of(own[0]);
      if (token.label >= 0) starting_with[static_cast<size_t>(token.label)].push_back(id);
    }
    if (count > 1) {
      token.second_kind = is_word(own[1]) ? kLetter : kNotLetter;
      token.second_label = label_of(own[1]);
    }
    kinds[static_cast<size_t>(id)] = token.kind;
    if (!bytes.empty() && (static_cast<uint8_t>(bytes.front()) & 0xC0) == 0x80) {
      continuing.push_back(id);
    }
    for (const int32_t from : {kRoot, kInWord}) {
      bool found = false;
      const int32_t end = walk(from, token, [&found](int32_t) { found = true; });
      if (end > kRoot || found) sprouting[from == kRoot ? 0 : 1].push_back(id);
    }
  }
};

class TermReward : public Reward {
 public:
  explicit TermReward(std::shared_ptr<const Vocabulary> vocabulary)
      : vocabulary_(std::move(vocabulary)), matcher_(vocabulary_->matcher) {
    counted_.assign(static_cast<size_t>(matcher_.terms()), 0);
    shortest_.resize(matcher_.size());
    potential_.resize(matcher_.size());
    matcher_.potentials(counted_, shortest_, potential_);
    for (Alternative& alternative : alternatives_) alternative.potential.resize(matcher_.size());
    goes_on_.assign(vocabulary_->labels.size(), 0);
    rewards_.assign(vocab_size(), 0.0);
    for (const int32_t from : {kRoot, kInWord}) {
      for (const int32_t id : vocabulary_->sprouting[from == kRoot ? 0 : 1]) {
        sprouts(from).push_back({id, 0.0});
      }
    }
    reserve();
    worth_of_sprouts();
  }

  size_t vocab_size() const override { return vocabulary_->tokens.size(); }

  std::unique_ptr<Reward> clone() const override {
    auto twin = std::make_unique<TermReward>(*this);
    twin->reserve();
    return twin;
  }

  const double* of_candidates() override {
    before_ = potential_of(state_);
    found_.clear();
    if (held_.needed == 0) {
      from_whole_character(state_);
      return rewards_.data();
    }
    // Whatever does not go on with the unfinished character makes U+FFFD of it.
    const int32_t state = matcher_.feed(state_, kReplacement, remember());
    from_whole_character(state);
    found_.clear();
    for (const int32_t id : vocabulary_->continuing) {
      const std::string_view bytes = vocabulary_->tokenizer.bytes_of(id);
      if (!held_.goes_on_with(static_cast<uint8_t>(bytes.front()))) continue;
      Unfinished held = held_;
      const int32_t end = walk_bytes(state_, held, bytes);
      assign(id, worth(end));
      found_.clear();
    }
    return rewards_.data();
  }

  void advance(int32_t id) override {
    const std::string_view bytes = vocabulary_->tokenizer.bytes_of(id);
    found_.clear();
    if (bytes.empty()) {
      if (held_.needed != 0) state_ = matcher_.feed(state_, kReplacement, remember());
      held_ = Unfinished();
      state_ = matcher_.feed(state_, kEnd, remember());
    } else {
      state_ = walk_bytes(state_, held_, bytes);
    }
    bool changed = false;
    for (const int32_t term : found_) {
      changed |= !counted_[static_cast<size_t>(term)];
      counted_[static_cast<size_t>(term)] = 1;
    }
    if (changed) {
      for (Alternative& alternative : alternatives_) alternative.fresh.clear();
      matcher_.potentials(counted_, shortest_, potential_);
      worth_of_sprouts();
    }
  }

 private:
  // A token that leads somewhere from kRoot or kInWord, and what it is worth there.
  struct Sprout {
    int32_t id;
    double worth;
  };

  // Potentials with some more terms counted; few sets occur in one step.
  struct Alternative {
    std::vector<int32_t> fresh;
    std::vector<double> potential;
  };

  struct Remember {
    std::vector<int32_t>& found;
    void operator()(int32_t term) const { found.push_back(term); }
  };
  Remember remember() { return {found_}; }

  // Room for what grows within a step.
  void reserve() {
    touched_.reserve(vocab_size());
    found_.reserve(counted_.size() + 64);
    fresh_.reserve(counted_.size() + 64);
    for (Alternative& alternative : alternatives_) alternative.fresh.reserve(counted_.size());
  }

  std::vector<Sprout>& sprouts(int32_t state) { return sprouts_[state == kRoot ? 0 : 1]; }

  void worth_of_sprouts() {
    for (const int32_t from : {kRoot, kInWord}) {
      for (Sprout& sprout : sprouts(from)) {
        found_.clear();
        const int32_t end = walk(from, vocabulary_->tokens[static_cast<size_t>(sprout.id)]);
        before_ = 0.0;
        sprout.worth = worth(end);
      }
    }
    found_.clear();
  }

  // Adds what is certain on the way to `found_`.
  int32_t walk(int32_t state, const Token& token) {
    return vocabulary_->walk(state, token, remember());
  }

  int32_t walk_bytes(int32_t state, Unfinished& held, std::string_view bytes) {
    for (const char byte : bytes) {
      decode(held, static_cast<uint8_t>(byte),
             [&](uint32_t code) { state = matcher_.feed(state, folded(code), remember()); });
    }
    return state;
  }

  double potential_of(int32_t state) const {
    return state > kRoot ? potential_[static_cast<size_t>(state)] : 0.0;
  }

  // The reward of coming to `end` with the terms in `found_` on the way.
  double worth(int32_t end) {
    if (found_.empty()) return potential_of(end) - before_;
    fresh_.clear();
    for (const int32_t term : found_) {
      if (!counted_[static_cast<size_t>(term)]) fresh_.push_back(term);
    }
    std::sort(fresh_.begin(), fresh_.end());
    fresh_.erase(std::unique(fresh_.begin(), fresh_.end()), fresh_.end());
    if (fresh_.empty()) return potential_of(end) - before_;
    const double terms = static_cast<double>(fresh_.size());
    if (end <= kRoot) return terms - before_;
    return terms + alternative().potential[static_cast<size_t>(end)] - before_;
  }

  const Alternative& alternative() {
    for (const Alternative& known : alternatives_) {
      if (known.fresh == fresh_) return known;
    }
    Alternative& made = alternatives_[next_alternative_];
    next_alternative_ = (next_alternative_ + 1) % kAlternatives;
    made.fresh = fresh_;
    for (const int32_t term : fresh_) counted_[static_cast<size_t>(term)] = 1;
    matcher_.potentials(counted_, shortest_, made.potential);
    for (const int32_t term : fresh_) counted_[static_cast<size_t>(term)] = 0;
    return made;
  }

  void assign(int32_t id, double reward) {
    rewards_[static_cast<size_t>(id)] = reward;
    if (touched_.size() < touched_.capacity()) {
      touched_.push_back(id);
    } else {
      all_touched_ = true;
    }
  }

  // Every reward to that of its kind.
  void fill(const std::array<double, 4>& of_kind) {
    if (of_kind == filled_ && !all_touched_ && touched_.size() < rewards_.size() / 8) {
      for (const int32_t id : touched_) {
        rewards_[static_cast<size_t>(id)] = of_kind[vocabulary_->kinds[static_cast<size_t>(id)]];
      }
    } else {
      for (size_t i = 0; i < rewards_.size(); ++i) rewards_[i] = of_kind[vocabulary_->kinds[i]];
    }
    filled_ = of_kind;
    touched_.clear();
    all_touched_ = false;
  }

  // Rewards from `state`, with `found_` already certain, where no character is unfinished.
  void from_whole_character(int32_t state) {
    const size_t already = found_.size();
    std::array<double, 4> of_kind{};
    for (const Kind kind : {kLetter, kNotLetter, kPart, kNothing}) {
      int32_t end = state;
      if (kind != kPart) {
        const uint32_t code = kind == kLetter ? kOtherLetter : kind == kNotLetter ? kOther : kEnd;
        end = matcher_.feed(state, code, remember());
      }
      of_kind[kind] = worth(end);
      found_.resize(already);
    }
    fill(of_kind);
    for (const Kind kind : {kLetter, kNotLetter}) {
      const int32_t from = matcher_.abandon(state, kind == kLetter, remember());
      const bool plain = !any_fresh();
      for (const Sprout& sprout : sprouts(from)) {
        const Token& token = vocabulary_->tokens[static_cast<size_t>(sprout.id)];
        if (token.kind == kind) assign(sprout.id, worth_of(sprout, token, from, plain));
      }
      found_.resize(already);
    }
    matcher_.for_each_way_on(state, [&](const Matcher::Edge& edge) {
      const int32_t label = vocabulary_->label_of(edge.code);
      if (is_word(edge.code)) {
        for (const int32_t id : vocabulary_->starting_with[static_cast<size_t>(label)]) {
          walk_one(state, id, already);
        }
      } else {
        after_separator(state, edge.code, label, already);
      }
    });
  }

  // Tokens that begin with a character that is no letter and goes on from `state`; with a space
  // that may be most of the vocabulary, so they are told apart by their second character.
  void after_separator(int32_t state, uint32_t code, int32_t label, size_t already) {
    const std::vector<int32_t>& ids = vocabulary_->starting_with[static_cast<size_t>(label)];
    const int32_t middle = matcher_.feed(state, code, remember());
    const size_t with_separator = found_.size();
    std::array<double, 4> of_kind{};
    for (const Kind kind : {kLetter, kNotLetter, kPart}) {
      int32_t end = middle;
      if (kind != kPart) {
        end = matcher_.feed(middle, kind == kLetter ? kOtherLetter : kOther, remember());
      }
      of_kind[kind] = worth(end);
      found_.resize(with_separator);
    }
    matcher_.for_each_way_on(middle, [&](const Matcher::Edge& edge) {
      goes_on_[static_cast<size_t>(vocabulary_->label_of(edge.code))] = 1;
    });
    const auto goes_on = [this](const Token& token) {
      return token.second_label >= 0 && goes_on_[static_cast<size_t>(token.second_label)] != 0;
    };
    for (const int32_t id : ids) {
      const Token& token = vocabulary_->tokens[static_cast<size_t>(id)];
      if (!goes_on(token)) assign(id, of_kind[token.second_kind]);
    }
    // What follows the separator is on its own, as it is after a separator inside a word.
    for (const Kind kind : {kLetter, kNotLetter}) {
      (void)matcher_.abandon(middle, kind == kLetter, remember());
      const bool plain = !any_fresh();
      for (const Sprout& sprout : sprouts(kInWord)) {
        const Token& token = vocabulary_->tokens[static_cast<size_t>(sprout.id)];
        if (token.label != label || token.second_kind != kind || goes_on(token)) continue;
        assign(sprout.id, worth_of(sprout, token, kInWord, plain));
      }
      found_.resize(with_separator);
    }
    found_.resize(already);
    for (const int32_t id : ids) {
      if (goes_on(vocabulary_->tokens[static_cast<size_t>(id)])) walk_one(state, id, already);
    }
    std::fill(goes_on_.begin(), goes_on_.end(), 0);
  }

  bool any_fresh() const {
    for (const int32_t term : found_) {
      if (!counted_[static_cast<size_t>(term)]) return true;
    }
    return false;
  }

  double worth_of(const Sprout& sprout, const Token& token, int32_t from, bool plain) {
    if (plain) return sprout.worth - before_;
    const size_t already = found_.size();
    const double reward = worth(walk(from, token));
    found_.resize(already);
    return reward;
  }

  void walk_one(int32_t state, int32_t id, size_t already) {
    found_.resize(already);
    assign(id, worth(walk(state, vocabulary_->tokens[static_cast<size_t>(id)])));
    found_.resize(already);
  }

  static constexpr size_t kAlternatives = 8;

  const std::shared_ptr<const Vocabulary> vocabulary_;
  const Matcher& matcher_;
  std::vector<uint8_t> counted_;
  std::vector<int32_t> shortest_;
  std::vector<double> potential_;
  std::array<Alternative, kAlternatives> alternatives_;
  size_t next_alternative_ = 0;
  std::array<std::vector<Sprout>, 2> sprouts_;

  // The text so far.
  int32_t state_ = kRoot;
  Unfinished held_;

  // One step.
  double before_ = 0.0;
  std::vector<int32_t> found_, fresh_;
  std::vector<uint8_t> goes_on_;
  std::vector<double> rewards_;
  std::array<double, 4> filled_{};
  std::vector<int32_t> touched_;
  bool all_touched_ = true;
};

}  // namespace

std::unique_ptr<Reward> token_reward(std::vector<double> values) {
  return std::make_unique<TokenReward>(std::move(values));
}

std::unique_ptr<Reward> char_reward(const Tokenizer& tokenizer, const std::string& characters) {
  return token_reward(rewards_of_characters(tokenizer, characters));
}

std::unique_ptr<Reward> term_reward(const Tokenizer& tokenizer,
                                    const std::vector<std::string>& terms) {
  return std::make_unique<TermReward>(std::make_shared<const Vocabulary>(tokenizer, terms));
}

std::unique_ptr<Reward> sum_reward(std::vector<WeightedReward> parts) {
  if (parts.empty()) throw UsageError("a sum of rewards needs a reward");
  for (const WeightedReward& part : parts) {
    if (!std::isfinite(part.weight)) throw UsageError("the weight of a reward must be finite");
    if (part.reward->vocab_size() != parts.front().reward->vocab_size()) {
      throw UsageError("the rewards of a sum are for different vocabularies");
    }
  }
  if (parts.size() == 1 && parts.front().weight == 1.0) return std::move(parts.front().reward);
  return std::make_unique<SumReward>(std::move(parts));
}

}  // namespace nanogpt
