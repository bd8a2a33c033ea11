// The process around the work: standard output, interruptions, clock.
#pragma once

#include <chrono>
#include <string_view>

namespace nanogpt {

// The reader of standard output went away (`nanogpt-generate … | head`): nothing is left to say.
struct ReaderLeft {};

// SIGINT or SIGTERM came; thrown where work can stop.
struct Interrupted {};

// From here on an interruption ends the process at once, until `interruptions_wait`; a closed pipe
// is an error of write instead of a signal.
void handle_signals();

// From here on SIGINT and SIGTERM are only noted, for `check_interruption` to find at the next
// token. A second one ends the process at once.
void interruptions_wait();

// Throws Interrupted where one has come.
void check_interruption();

// The signal that came, 0 before one.
int interruption();

// Writes to standard output, unbuffered. Throws ReaderLeft where it is closed, Interrupted where
// the reader does not take the text and an interruption came, Error (1) for a full disk.
void print(std::string_view text);

// Closes standard output: some file systems report a full disk only now. Throws Error (1).
void finish_printing();

// Writes to standard error, whatever becomes of it.
void say(std::string_view text);

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace nanogpt
