#include "generate/inputs.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "engine/error.h"
#include "engine/utf8.h"

namespace nanogpt {
namespace {

constexpr size_t kLargestBytes = size_t{1} << 30;

std::string trimmed(const std::string& text) {
  const char* spaces = " \t\r\n\v\f";
  const size_t first = text.find_first_not_of(spaces);
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(spaces) - first + 1);
}

std::vector<std::string> pieces(const std::string& text, char separator) {
  std::vector<std::string> found;
  size_t start = 0;
  while (start <= text.size()) {
    const size_t end = std::min(text.find(separator, start), text.size());
    const std::string piece = trimmed(text.substr(start, end - start));
    if (!piece.empty()) found.push_back(piece);
    start = end + 1;
  }
  return found;
}

bool ends_in(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

std::optional<size_t> first_bad_byte(std::string_view text) {
  const size_t valid = utf8_valid_prefix(text);
  return valid == text.size() ? std::nullopt : std::optional<size_t>(valid);
}

std::string visible(std::string_view text) {
  std::string out;
  const char* const end = text.data() + text.size();
  for (const char* at = text.data(); at < end;) {
    const Utf8Step step = utf8_step(at, end);
    // U+0080 to U+009F are control characters too; some terminals obey them.
    if (step.kind == Utf8Step::character && step.code >= 0xA0) {
      out.append(at, step.length);
    } else if (*at == '\n') {
      out += "\\n";
    } else if (*at == '\t') {
      out += "\\t";
    } else if (*at == '\\') {
      out += "\\\\";
    } else {
      for (int i = 0; i < step.length; ++i) {
        const auto byte = static_cast<unsigned char>(at[i]);
        char code[8];
        const bool shown = byte >= 0x20 && byte < 0x7F;
        std::snprintf(code, sizeof code, shown ? "%c" : "\\x%02x", byte);
        out += code;
      }
    }
    at += step.length;
  }
  return out;
}

std::string read_file(const std::string& path, const std::string& what) {
  const bool standard = path == "-";
  const std::string name = standard ? "standard input" : path;
  const auto refuse = [&](const std::string& reason) {
    return InputError("cannot read " + what + " " + visible(name) + ": " + reason);
  };
  const int descriptor = standard ? STDIN_FILENO : open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) throw refuse(std::strerror(errno));
  std::string content;
  char block[65536];
  while (true) {
    const ssize_t got = read(descriptor, block, sizeof block);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      const int reason = errno;
      if (!standard) close(descriptor);
      throw refuse(std::strerror(reason));
    }
    if (got == 0) break;
    content.append(block, static_cast<size_t>(got));
    if (content.size() > kLargestBytes) {
      if (!standard) close(descriptor);
      throw refuse("it has more than 1 GiB");
    }
  }
  if (!standard) close(descriptor);
  return content;
}

std::string read_text(const std::string& path, const std::string& what) {
  std::string text = read_file(path, what);
  if (const auto bad = first_bad_byte(text)) {
    throw InputError(visible(path == "-" ? "standard input" : path) +
                     " is not UTF-8 text: bad byte at " + std::to_string(*bad));
  }
  return text;
}

std::vector<std::string> read_terms(const std::string& value) {
  struct stat status = {};
  const bool exists = stat(value.c_str(), &status) == 0;
  std::vector<std::string> terms;
  if ((exists && !S_ISDIR(status.st_mode)) || (!exists && ends_in(value, ".txt"))) {
    terms = pieces(read_text(value, "the terms of --reward-terms"), '\n');
    if (terms.empty()) throw InputError(visible(value) + " holds no terms, one a line");
    return terms;
  }
  if (first_bad_byte(value)) throw UsageError("--reward-terms is not UTF-8 text");
  terms = pieces(value, ',');
  if (terms.empty()) throw UsageError("--reward-terms needs at least one term");
  return terms;
}

}  // namespace nanogpt
