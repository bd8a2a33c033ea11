#include "generate/arguments.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <set>
#include <string_view>

#include "engine/error.h"
#include "generate/inputs.h"

namespace nanogpt {
namespace {

constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

// The text of a limit as Python's {:g} gives it.
std::string shown(double limit) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", limit);
  return text;
}

// What a user typed, in quotes. Bytes that would disturb a terminal are escaped.
std::string quoted(const std::string& text) { return "'" + visible(text) + "'"; }

// NaN as a limit means that there is none.
struct Limits {
  double minimum = kNone;
  double above = kNone;
  double maximum = kNone;
};

void check_limits(const std::string& flag, const std::string& text, double value, Limits limits) {
  if (!std::isfinite(value)) {
    throw UsageError(flag + " must be finite, not " + quoted(text));
  }
  const char* word = nullptr;
  double limit = 0;
  if (value < limits.minimum) {
    word = "at least", limit = limits.minimum;
  } else if (value <= limits.above) {
    word = "above", limit = limits.above;
  } else if (value > limits.maximum) {
    word = "at most", limit = limits.maximum;
  }
  if (word != nullptr) {
    throw UsageError(flag + " must be " + word + " " + shown(limit) + ", not " + quoted(text));
  }
}

// from_chars knows no plus sign; Python's int and float do.
std::string_view without_plus(const std::string& text) {
  std::string_view view = text;
  if (view.size() > 1 && view[0] == '+' && view[1] != '-') view.remove_prefix(1);
  return view;
}

int64_t whole(const std::string& flag, const std::string& text, int64_t minimum, int64_t maximum) {
  const std::string_view digits = without_plus(text);
  int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (end != digits.data() + digits.size() || digits.empty() ||
      error == std::errc::invalid_argument) {
    throw UsageError(flag + " must be a whole number, not " + quoted(text));
  }
  if (error == std::errc::result_out_of_range) {
    value = digits[0] == '-' ? std::numeric_limits<int64_t>::min()
                             : std::numeric_limits<int64_t>::max();
  }
  if (value < minimum || value > maximum) {
    const bool low = value < minimum;
    throw UsageError(flag + " must be " + (low ? "at least " : "at most ") +
                     std::to_string(low ? minimum : maximum) + ", not " + quoted(text));
  }
  return value;
}

double real(const std::string& flag, const std::string& text, Limits limits = {}) {
  const std::string_view digits = without_plus(text);
  double value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (end != digits.data() + digits.size() || digits.empty() ||
      error == std::errc::invalid_argument) {
    throw UsageError(flag + " must be a number, not " + quoted(text));
  }
  if (error == std::errc::result_out_of_range) {
    throw UsageError(flag + " must be a number that fits float64, not " + quoted(text));
  }
  check_limits(flag, text, value, limits);
  return value;
}

uint64_t parse_seed(const std::string& flag, const std::string& text) {
  const std::string_view digits = without_plus(text);
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (end == digits.data() + digits.size() && error == std::errc() && !digits.empty()) return value;
  if (error == std::errc::result_out_of_range && end == digits.data() + digits.size()) {
    throw UsageError(flag + " must be below 2^64, not " + quoted(text));
  }
  whole(flag, text, 0, std::numeric_limits<int64_t>::max());  // throws for what is not a number
  throw UsageError(flag + " must be a whole number, not " + quoted(text));
}

std::string unicode(const std::string& flag, const std::string& text) {
  if (first_bad_byte(text)) throw UsageError(flag + " is not UTF-8 text: " + quoted(text));
  return text;
}

using Take = void (*)(Arguments&, const std::string& flag, const std::string& value);
using Switch = bool Arguments::*;

struct Flag {
  const char* name;
  const char* placeholder;  // null for a switch
  const char* help;
  const char* shown_default;
  Take take;        // of a flag with a value
  Switch member;    // of a switch
  bool with_bench;  // means something beside --bench
  const char* group;
};

constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostThreads = 1024;

const Flag kFlags[] = {
    {"--prompt", "TEXT", "text to continue", "start a new document",
     [](Arguments& a, const std::string& f, const std::string& v) { a.prompt = unicode(f, v); },
     nullptr, false, "text"},
    {"--file", "PATH", "read the prompt from this file, - for standard input", "no file",
     [](Arguments& a, const std::string&, const std::string& v) { a.file = v; }, nullptr, false,
     "text"},
    {"--max-new-tokens", "N", "tokens to write", "200",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.max_new_tokens = whole(f, v, 0, kMostTokens);
     },
     nullptr, false, "text"},
    {"--stop", "TEXT", "end the text before this; may be given several times", "no stop",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.stops.push_back(unicode(f, v));
     },
     nullptr, false, "text"},
    {"--ignore-eos", nullptr, "write on after the end-of-text token", "yes", nullptr,
     &Arguments::ignore_eos, false, "text"},
    {"--confidence", nullptr, "show how probable the model held each token, on standard error",
     "no", nullptr, &Arguments::confidence, false, "text"},
    {"--json", nullptr, "print one JSON object instead of text", "no", nullptr, &Arguments::json,
     true, "text"},

    {"--temperature", "X", "divides the logits; 0 always takes the likeliest", "1.0",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.filters.temperature = real(f, v, {0, kNone, kNone});
     },
     nullptr, false, "sampling"},
    {"--top-k", "N", "keep the k likeliest tokens", "all",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.filters.top_k = whole(f, v, 1, std::numeric_limits<int64_t>::max());
     },
     nullptr, false, "sampling"},
    {"--top-p", "X", "keep the likeliest tokens that reach this probability together", "all",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.filters.top_p = real(f, v, {kNone, 0, 1});
     },
     nullptr, false, "sampling"},
    {"--min-p", "X", "keep tokens at least this fraction as likely as the likeliest", "all",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.filters.min_p = real(f, v, {0, kNone, 1});
     },
     nullptr, false, "sampling"},
    {"--repetition-penalty", "X", "above 1 makes tokens that stand in the text less likely", "1.0",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.filters.repetition_penalty = real(f, v, {kNone, 0, kNone});
     },
     nullptr, false, "sampling"},
    {"--seed", "N", "same seed, same text", "a new one",
     [](Arguments& a, const std::string& f, const std::string& v) { a.seed = parse_seed(f, v); },
     nullptr, true, "sampling"},

    {"--reward-chars", "CHARS", "reward tokens that end in one of these characters", "no reward",
     [](Arguments& a, const std::string& f, const std::string& v) {
       if (v.empty()) throw UsageError(f + " needs at least one character");
       a.reward_chars = unicode(f, v);
     },
     nullptr, false, "rewards"},
    {"--reward-terms", "TERMS", "reward progress through these terms: a,b,c or a file of lines",
     "no reward",
     [](Arguments& a, const std::string& f, const std::string& v) {
       if (v.empty()) throw UsageError(f + " needs at least one term");
       a.reward_terms = v;
     },
     nullptr, false, "rewards"},
    {"--beta", "X", "multiplies the reward that is added to the log-probabilities", "1.0",
     [](Arguments& a, const std::string& f, const std::string& v) { a.beta = real(f, v); }, nullptr,
     false, "rewards"},

    {"--engine", "native|torchscript", "what computes; torchscript needs the plug-in of make build",
     "native",
     [](Arguments& a, const std::string& f, const std::string& v) {
       if (v != "native" && v != "torchscript") {
         throw UsageError(f + " must be one of native, torchscript, not " + quoted(v));
       }
       a.engine = v == "native" ? Engine::native : Engine::torchscript;
     },
     nullptr, true, "machine"},
    {"--trust", nullptr, "let torchscript run an archive whose program is not one of export", "no",
     nullptr, &Arguments::trust, true, "machine"},
    {"--threads", "N", "CPU threads", "chosen by measurement",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.threads = static_cast<int>(whole(f, v, 1, kMostThreads));
     },
     nullptr, true, "machine"},
    {"--bench", nullptr, "measure reading a prompt and writing, in tokens a second", "no", nullptr,
     &Arguments::bench, true, "machine"},
    {"--repetitions", "N", "how often --bench measures; -r N is the same", "5",
     [](Arguments& a, const std::string& f, const std::string& v) {
       a.repetitions = static_cast<int>(whole(f, v, 1, 1000000));
     },
     nullptr, true, "machine"},

    {"--help", nullptr, "print this", "no", nullptr, &Arguments::help, true, "other"},
    {"--version", nullptr, "print the version", "no", nullptr, &Arguments::version, true, "other"},
};

const Flag* find_flag(const std::string& name) {
  for (const Flag& flag : kFlags) {
    if (name == flag.name) return &flag;
  }
  return nullptr;
}

// --no-x for a switch --x.
const Flag* find_negation(const std::string& name) {
  if (name.rfind("--no-", 0) != 0) return nullptr;
  const Flag* flag = find_flag("--" + name.substr(5));
  const bool can = flag != nullptr && flag->placeholder == nullptr &&
                   flag->member != &Arguments::help && flag->member != &Arguments::version;
  return can ? flag : nullptr;
}

// Insertions, deletions, replacements and swaps of neighbours between two words.
size_t distance(const std::string& a, const std::string& b) {
  std::vector<std::vector<size_t>> cost(a.size() + 1, std::vector<size_t>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        cost[i][j] = i + j;
        continue;
      }
      const size_t replaced = cost[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1);
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, replaced});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
      }
    }
  }
  return cost[a.size()][b.size()];
}

std::string nearest(const std::string& word) {
  // A word of the user's may be a whole pasted text; no flag is near that.
  if (word.size() > 64) return "";
  std::string best;
  size_t least = std::numeric_limits<size_t>::max();
  for (const Flag& flag : kFlags) {
    for (const std::string& name :
         {std::string(flag.name), "--no-" + std::string(flag.name).substr(2)}) {
      if (find_flag(name) == nullptr && find_negation(name) == nullptr) continue;
      // The beginning of a flag means that flag.
      const bool begins = word.size() > 3 && name.compare(0, word.size(), word) == 0;
      const size_t changes = begins ? 0 : distance(word, name);
      if (changes < least) least = changes, best = name;
    }
  }
  // Half of the letters after the dashes may differ, as in the Python commands.
  return 2 * least <= std::max(word.size(), best.size()) ? "; the nearest is " + best : "";
}

std::string name_of_short(const std::string& name) {
  if (name == "-r") return "--repetitions";
  if (name == "-h") return "--help";
  return name;
}

void check_together(const Arguments& a, const std::set<std::string>& given) {
  if (a.bench) {
    for (const Flag& flag : kFlags) {
      if (!flag.with_bench && given.count(flag.name) != 0) {
        throw UsageError("--bench writes no text, so it takes no " + std::string(flag.name));
      }
    }
  } else if (given.count("--repetitions") != 0) {
    throw UsageError("--repetitions belongs to --bench");
  }
  if (a.prompt && a.file) throw UsageError("--prompt and --file exclude each other");
  if (given.count("--beta") != 0 && !a.reward_chars && !a.reward_terms) {
    throw UsageError("--beta multiplies a reward: give --reward-chars or --reward-terms too");
  }
  if (a.trust && a.engine != Engine::torchscript) {
    throw UsageError("--trust belongs to --engine torchscript: native runs no code of the file");
  }
  const std::string safetensors = ".safetensors";
  if (a.engine == Engine::torchscript && a.model.size() >= safetensors.size() &&
      a.model.compare(a.model.size() - safetensors.size(), safetensors.size(), safetensors) == 0) {
    throw UsageError(
        "--engine torchscript runs the archive that export writes, not a .safetensors file; "
        "use native");
  }
}

}  // namespace

Arguments parse_arguments(int count, const char* const* words) {
  Arguments arguments;
  std::set<std::string> given;
  bool flags_end = false;
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (flags_end || word.size() < 2 || word[0] != '-') {
      if (!arguments.model.empty()) {
        throw UsageError("unexpected argument " + quoted(word) +
                         ": one model file, and every other value follows a flag");
      }
      if (word.empty()) throw UsageError("the model's path is empty");
      arguments.model = word;
      continue;
    }
    if (word == "--") {
      flags_end = true;
      continue;
    }
    const size_t equals = word.find('=');
    const std::string typed = word.substr(0, equals);
    const std::string name = name_of_short(typed);
    const Flag* flag = find_flag(name);
    const Flag* negated = flag == nullptr ? find_negation(name) : nullptr;
    if (flag == nullptr && negated == nullptr) {
      throw UsageError("there is no flag " + visible(typed) + nearest(typed));
    }
    given.insert(flag != nullptr ? flag->name : negated->name);
    if (negated != nullptr || flag->placeholder == nullptr) {
      if (equals != std::string::npos) throw UsageError(name + " takes no value");
      arguments.*(negated != nullptr ? negated : flag)->member = negated == nullptr;
      continue;
    }
    std::string value;
    if (equals != std::string::npos) {
      value = word.substr(equals + 1);
    } else {
      const std::string next = i + 1 < count ? words[i + 1] : "";
      const std::string next_name = name_of_short(next.substr(0, next.find('=')));
      if (i + 1 == count) throw UsageError(name + " needs a value");
      if (find_flag(next_name) != nullptr || find_negation(next_name) != nullptr) {
        throw UsageError(name + " needs a value; write " + name + "=" + next +
                         " where that is the value");
      }
      value = next;
      ++i;
    }
    flag->take(arguments, name, value);
  }
  if (arguments.help || arguments.version) return arguments;
  if (arguments.model.empty()) {
    throw UsageError("which model? nanogpt-generate MODEL.pt --prompt TEXT");
  }
  check_together(arguments, given);
  return arguments;
}

std::string help_text() {
  std::string text =
      "usage: nanogpt-generate MODEL [flags]\n\n"
      "Write text from a model: the MODEL.pt of `nanogpt export`, or a .safetensors model file.\n";
  std::string group;
  for (const Flag& flag : kFlags) {
    if (group != flag.group) {
      group = flag.group;
      text += "\n" + group + ":\n";
    }
    std::string left = "  " + std::string(flag.name);
    const bool is_switch = flag.placeholder == nullptr;
    const bool can_negate = find_negation("--no-" + std::string(flag.name).substr(2)) != nullptr;
    if (can_negate) left += ", --no-" + std::string(flag.name).substr(2);
    if (!is_switch) left += " " + std::string(flag.placeholder);
    constexpr size_t kColumn = 32;
    if (left.size() + 2 > kColumn) {
      text += left + "\n" + std::string(kColumn, ' ');
    } else {
      text += left + std::string(kColumn - left.size(), ' ');
    }
    text += flag.help;
    if (!is_switch || can_negate) text += " (default: " + std::string(flag.shown_default) + ")";
    text += "\n";
  }
  text +=
      "\nExit codes: 0 done; 1 failed while running; 2 a wrong or impossible flag; 3 an input that "
      "is\nmissing, damaged or does not fit; 130 interrupted; 143 terminated.\n";
  return text;
}

}  // namespace nanogpt
