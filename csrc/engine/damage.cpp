#include "engine/damage.h"

#include "engine/error.h"

namespace nanogpt {

void damaged(const std::string& file, const std::string& what) {
  throw InputError(file + " is damaged: " + what);
}

std::string shown(std::string_view bytes) {
  static const char digits[] = "0123456789abcdef";
  constexpr size_t longest = 100;
  std::string text = "'";
  for (const char byte : bytes.substr(0, longest)) {
    const auto value = static_cast<unsigned char>(byte);
    if (value >= 0x20 && value < 0x7f) {
      text += byte;
    } else {
      text += {'\\', 'x', digits[value >> 4], digits[value & 15]};
    }
  }
  return text + (bytes.size() > longest ? "…'" : "'");
}

}  // namespace nanogpt
