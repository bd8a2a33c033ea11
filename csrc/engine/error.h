// What can go wrong, in one sentence for the user, with the exit code of the commands.
#pragma once

#include <stdexcept>
#include <string>

namespace nanogpt {

class Error : public std::runtime_error {
 public:
  Error(const std::string& sentence, int exit_code)
      : std::runtime_error(sentence), exit_code(exit_code) {}
  const int exit_code;
};

// A flag or its value is wrong or impossible here.
class UsageError : public Error {
 public:
  explicit UsageError(const std::string& sentence) : Error(sentence, 2) {}
};

// An input is missing, damaged, foreign or does not fit.
class InputError : public Error {
 public:
  explicit InputError(const std::string& sentence) : Error(sentence, 3) {}
};

}  // namespace nanogpt
