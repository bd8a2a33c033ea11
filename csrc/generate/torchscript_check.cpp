#include "generate/torchscript_check.h"

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <string_view>
#include <vector>

#include "engine/archive.h"
#include "engine/damage.h"

namespace nanogpt {
namespace {

// Without the digits at its end, which count variables: every word of every export, sorted.
// tests/test_security.py makes the list anew, and knows each operator that it can name.
constexpr std::string_view kWords[] = {
    "Attention",
    "Block",
    "Exported",
    "False",
    "FeedForward",
    "Int8Linear",
    "Int8Table",
    "Linear",
    "List",
    "Module",
    "ModuleList",
    "None",
    "NoneType",
    "Norm",
    "Optional",
    "RaiseException",
    "Table",
    "Tensor",
    "Transformer",
    "True",
    "_",
    "__annotations__",
    "__buffers__",
    "__parameters__",
    "__torch__",
    "_set_item",
    "add",
    "angles",
    "annotate",
    "approximate",
    "arange",
    "attn",
    "batch",
    "bias",
    "c_attn",
    "c_fc",
    "c_proj",
    "cat",
    "class",
    "container",
    "copy_",
    "cos",
    "count",
    "decode",
    "def",
    "device",
    "dim",
    "div",
    "dtype",
    "else",
    "embedding",
    "end",
    "eq",
    "export",
    "floordiv",
    "format",
    "forward",
    "ge",
    "gelu",
    "getattr",
    "gt",
    "h",
    "heads",
    "if",
    "index",
    "int",
    "k",
    "keys",
    "layer_norm",
    "layout",
    "length",
    "linear",
    "list",
    "ln_",
    "ln_f",
    "lt",
    "max",
    "mean",
    "min",
    "mlp",
    "modules",
    "mul",
    "nanogpt",
    "ne",
    "neg",
    "nn",
    "ops",
    "out",
    "pairs",
    "pass",
    "permute",
    "places",
    "positions",
    "pow",
    "prefill",
    "prim",
    "q",
    "qkv",
    "reset",
    "reshape",
    "return",
    "rsqrt",
    "scale",
    "scaled_dot_product_attention",
    "select",
    "self",
    "shape",
    "sin",
    "size",
    "slice",
    "sub",
    "to",
    "tokens",
    "torch",
    "torchscript",
    "transformer",
    "transpose",
    "turns",
    "unbind",
    "unsqueeze",
    "v",
    "values",
    "view",
    "weight",
    "weight_scale",
    "width",
    "wpe",
    "wte",
    "x",
    "zeros",
};

// What stands in quotes, beside numbers.
constexpr std::string_view kTexts[] = {
    "a token is outside the vocabulary of {}",
    "bias",
    "builtins.ValueError",
    "decode takes one token a row, not {}",
    "decode takes the {} rows of the last prefill, not {}",
    "keys",
    "tanh",
    "tokens must be (B, T) with at least one row and one token",
    "values",
    "weight",
    "weight_scale",
    "{} tokens do not fit the context of {}: call prefill with the newest part of the text",
};

constexpr std::string_view kSigns = " \n,:.()[]=>-";
constexpr char kDigits[] = "0123456789";

const std::string kOurs = "__torch__.nanogpt.export.torchscript ";
const std::string kContainers = "__torch__.torch.nn.modules.container ";

template <typename Texts>
bool holds(const Texts& texts, std::string_view text) {
  return std::binary_search(std::begin(texts), std::end(texts), text);
}

bool is_number(std::string_view text) {
  return !text.empty() && text.find_first_not_of(kDigits) == std::string_view::npos;
}

// ASCII alone, whatever the locale is.
bool is_word_byte(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

// The word without the letters of `end` at its end.
std::string_view stem(std::string_view word, const char* end) {
  return word.substr(0, word.find_last_not_of(end) + 1);
}

// What is foreign in a piece of code without texts.
std::string foreign_words(std::string_view code) {
  for (size_t at = 0; at < code.size();) {
    size_t end = at;
    while (end < code.size() && is_word_byte(code[end])) ++end;
    if (end == at) {
      if (kSigns.find(code[at]) == std::string_view::npos) {
        return "its code holds the sign " + shown(code.substr(at, 1));
      }
      ++at;
      continue;
    }
    const std::string_view word = code.substr(at, end - at);
    // Before the sign of an exponent stand digits with an "e", and no name begins with a digit.
    const bool number = is_number(word) || (word.back() == 'e' && is_number(stem(word, "e")));
    if (!number && !holds(kWords, stem(word, kDigits))) {
      return "its code says " + shown(word);
    }
    at = end;
  }
  return "";
}

// How torch's parser takes the code apart does not matter: what is not a word of ours inside or
// outside of quotes is refused wherever it stands, and there is no sign that could hide one (no
// backslash, no other quotes, no two texts that would become one).
std::string foreign_code(std::string_view code) {
  for (bool quoted = false, first = true;; quoted = !quoted, first = false) {
    const size_t end = code.find('"');
    const std::string_view piece = code.substr(0, end);
    const bool last = end == std::string_view::npos;
    if (quoted) {
      if (last) return "its code has a text without an end";
      if (!is_number(piece) && !holds(kTexts, piece)) {
        return "its code holds the text " + shown(piece);
      }
    } else {
      if (std::string foreign = foreign_words(piece); !foreign.empty()) return foreign;
      if (!first && !last && piece.find_first_not_of(" \n") == std::string_view::npos) {
        return "its code joins two texts";
      }
    }
    if (last) return "";
    code.remove_prefix(end + 1);
  }
}

// Writes what torch's Pickler does: protocol 2, in which what comes again is named by its number.
class Pickle {
 public:
  Pickle() : bytes_("\x80\x02") {}

  // Between them, `text` and a value for every attribute.
  void open_object(const std::string& module_and_name) {
    global(module_and_name);
    bytes_ += ")\x81}(";
  }
  void close_object() { bytes_ += "ub"; }

  std::string finish() {
    keep();
    return bytes_ + ".";
  }

  void text(const std::string& text) {
    if (again("text " + text)) return;
    bytes_ += 'X';
    append(text.size(), 4);
    bytes_ += text;
    keep();
  }

  void whole(int64_t number) {
    if (number <= 0xFF) {
      bytes_ += 'K';
      append(static_cast<uint64_t>(number), 1);
    } else if (number <= 0xFFFF) {
      bytes_ += 'M';
      append(static_cast<uint64_t>(number), 2);
    } else if (number <= INT32_MAX) {
      bytes_ += 'J';
      append(static_cast<uint64_t>(number), 4);
    } else {
      bytes_ += "\x8a\x08";
      append(static_cast<uint64_t>(number), 8);
    }
  }

  // A dense tensor that begins at the beginning of its record.
  void tensor(DType dtype, const std::vector<int64_t>& shape, const std::string& record) {
    int64_t count = 1;
    for (const int64_t length : shape) count *= length;
    global("torch._utils _rebuild_tensor_v2");
    bytes_ += "((";
    text("storage");
    global(dtype == DType::f32    ? "torch FloatStorage"
           : dtype == DType::bf16 ? "torch BFloat16Storage"
                                  : "torch CharStorage");
    text(record);
    text("cpu");
    whole(count);
    bytes_ += "tQ";
    keep();
    whole(0);
    bytes_ += '(';
    for (const int64_t length : shape) whole(length);
    bytes_ += "t(";
    for (size_t i = 0; i < shape.size(); ++i) {
      int64_t stride = 1;
      for (size_t j = i + 1; j < shape.size(); ++j) stride *= std::max<int64_t>(shape[j], 1);
      whole(stride);
    }
    bytes_ += "t\x89";
    global("collections OrderedDict");
    bytes_ += ")RtR";
    keep();
  }

 private:
  void append(uint64_t number, int count) {
    for (int i = 0; i < count; ++i) bytes_ += static_cast<char>(number >> 8 * i & 0xFF);
  }

  void numbered(char narrow, char wide, size_t number) {
    bytes_ += number <= 0xFF ? narrow : wide;
    append(number, number <= 0xFF ? 1 : 4);
  }

  void keep() { numbered('q', 'r', kept_++); }

  bool again(const std::string& what) {
    const auto [place, is_new] = numbers_.emplace(what, kept_);
    if (!is_new) numbered('h', 'j', place->second);
    return !is_new;
  }

  void global(const std::string& module_and_name) {
    if (again(module_and_name)) return;
    const size_t space = module_and_name.find(' ');
    bytes_ +=
        'c' + module_and_name.substr(0, space) + '\n' + module_and_name.substr(space + 1) + '\n';
    keep();
  }

  std::string bytes_;
  std::map<std::string, size_t> numbers_;
  size_t kept_ = 0;
};

// The module tree of an export, as its attributes follow one another.
class Layout {
 public:
  Layout(const Weights& weights, const std::map<std::string, std::string>& records)
      : weights_(weights), records_(records) {}

  std::string pickle() {
    const Config& config = weights_.config;
    const std::vector<int64_t> empty = {config.n_layer, 0, config.n_head, config.block_size,
                                        config.head_width()};
    out_.open_object(kOurs + "Exported");
    out_.text("keys");
    out_.tensor(DType::f32, empty, "0");
    out_.text("values");
    out_.tensor(DType::f32, empty, "1");
    out_.text("length");
    out_.whole(0);
    out_.text("transformer");
    out_.open_object(kOurs + "Transformer");
    layer("wte", "transformer.wte", "Table");
    if (!config.rotary) layer("wpe", "transformer.wpe", "Table");
    out_.text("h");
    out_.open_object(kContainers + "ModuleList");
    for (int64_t i = 0; i < config.n_layer; ++i) block(std::to_string(i));
    out_.close_object();
    layer("ln_f", "transformer.ln_f", "Norm");
    out_.close_object();
    out_.close_object();
    return out_.finish();
  }

 private:
  void block(const std::string& number) {
    const std::string at = "transformer.h." + number;
    out_.text(number);
    out_.open_object(kOurs + "Block");
    layer("ln_1", at + ".ln_1", "Norm");
    out_.text("attn");
    out_.open_object(kOurs + "Attention");
    layer("c_attn", at + ".attn.c_attn", "Linear");
    layer("c_proj", at + ".attn.c_proj", "Linear");
    out_.close_object();
    layer("ln_2", at + ".ln_2", "Norm");
    out_.text("mlp");
    out_.open_object(kOurs + "FeedForward");
    layer("c_fc", at + ".mlp.c_fc", "Linear");
    layer("c_proj", at + ".mlp.c_proj", "Linear");
    out_.close_object();
    out_.close_object();
  }

  // A module that holds tensors.
  void layer(const std::string& attribute, const std::string& name, const std::string& kind) {
    const bool narrow = weights_.tensors.count(name + ".weight.scale") != 0;
    out_.text(attribute);
    out_.open_object(kOurs + (narrow ? "Int8" : "") + kind);
    for (const auto& [called, end] :
         {std::pair{"weight", ".weight"}, {"weight_scale", ".weight.scale"}, {"bias", ".bias"}}) {
      const auto found = weights_.tensors.find(name + end);
      if (found == weights_.tensors.end()) continue;
      out_.text(called);
      out_.tensor(found->second.dtype, found->second.shape, records_.at(found->first));
    }
    out_.close_object();
  }

  const Weights& weights_;
  const std::map<std::string, std::string>& records_;
  Pickle out_;
};

}  // namespace

std::string foreign_program(const ModelFile& file, const std::string& path) {
  const std::string_view bytes = file.bytes();
  const Archive archive(path, reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  const auto payload = [&](const ArchiveEntry& entry) {
    return bytes.substr(entry.offset, entry.size);
  };

  // What stands in a record, but for the tensors: the numbers after "data/".
  std::map<size_t, std::string> at_offset;
  std::set<std::string_view> expected = {"extra/nanogpt.json",
                                         ".data/version",
                                         "byteorder",
                                         "constants.pkl",
                                         "data.pkl",
                                         "data/0",
                                         "data/1",
                                         "code/__torch__/nanogpt/export/torchscript.py",
                                         "code/__torch__/torch/nn/modules/container.py"};
  for (const ArchiveEntry& entry : archive.entries()) {
    if (!entry.stored) return "its record " + shown(entry.name) + " is compressed";
    if (entry.name.substr(0, 5) == "data/" && is_number(entry.name.substr(5))) {
      if (entry.size > 0) at_offset.emplace(entry.offset, entry.name.substr(5));
    }
  }
  std::map<std::string, std::string> records;
  for (const auto& [name, tensor] : file.weights().tensors) {
    const auto offset = static_cast<size_t>(static_cast<const char*>(tensor.data) - bytes.data());
    const auto found = at_offset.find(offset);
    if (found == at_offset.end()) return "its tensors do not lie where those of an export do";
    records.emplace(name, found->second);
    const ArchiveEntry* const entry = archive.find("data/" + found->second);
    expected.insert(entry->name);
  }
  for (const ArchiveEntry& entry : archive.entries()) {
    if (expected.erase(entry.name) == 0) return "it holds " + shown(entry.name);
  }
  if (!expected.empty()) return "it lacks " + shown(*expected.begin());

  for (const ArchiveEntry& entry : archive.entries()) {
    if (entry.name.substr(0, 5) != "code/") continue;
    if (std::string foreign = foreign_code(payload(entry)); !foreign.empty()) return foreign;
  }
  const auto stands = [&](std::string_view name, std::string_view content) {
    return payload(*archive.find(name)) == content;
  };
  const std::string_view version = payload(*archive.find(".data/version"));
  if (version.size() > 4 || version.back() != '\n' ||
      !is_number(version.substr(0, version.size() - 1)) || !stands("byteorder", "little") ||
      !stands("constants.pkl", "\x80\x02).") || !stands("data/0", "") || !stands("data/1", "")) {
    return "its smaller records are not those of an export";
  }
  if (!stands("data.pkl", Layout(file.weights(), records).pickle())) {
    return "its data.pkl does not lay out the tensors of its index";
  }
  return "";
}

}  // namespace nanogpt
