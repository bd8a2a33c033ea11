// SHA-256, with the processor's own instructions where it has them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace nanogpt {

class Sha256 {
 public:
  // `portable` leaves the processor's instructions aside; for tests.
  explicit Sha256(bool portable = false);
  void update(const void* data, size_t size);
  void update(std::string_view text) { update(text.data(), text.size()); }
  // 64 lower-case hexadecimal digits. The object is used up.
  std::string hex();

 private:
  void compress(const uint8_t* blocks, size_t count);

  bool portable_;
  std::array<uint32_t, 8> state_;
  std::array<uint8_t, 64> held_{};
  size_t held_size_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace nanogpt
