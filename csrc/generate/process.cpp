#include "generate/process.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstring>
#include <string>

#include "engine/error.h"

namespace nanogpt {
namespace {

std::atomic<int> came{0};
std::atomic<bool> waits{false};
static_assert(std::atomic<int>::is_always_lock_free, "signal handlers need lock-free atomics");

constexpr int kGraceMilliseconds = 1000;

extern "C" void on_interruption(int signal_number) {
  if (!waits.load() || came.exchange(signal_number) != 0) {
    constexpr char kWord[] = "interrupted\n";
    [[maybe_unused]] const ssize_t ignored = write(STDERR_FILENO, kWord, sizeof kWord - 1);
    _exit(128 + signal_number);
  }
}

// A memory map of a file that someone shortens meanwhile.
extern "C" void on_bus_error(int) {
  constexpr char kSentence[] =
      "nanogpt-generate: the model file was shortened, or could not be read, while it was in use\n";
  [[maybe_unused]] const ssize_t ignored = write(STDERR_FILENO, kSentence, sizeof kSentence - 1);
  _exit(3);
}

void on(int signal_number, void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;  // no SA_RESTART: a blocked write has to notice
  sigaction(signal_number, &action, nullptr);
}

Error output_error(int reason) {
  if (reason == ENOSPC || reason == EDQUOT) return {"standard output: the disk is full", 1};
  return {"cannot write to standard output: " + std::string(std::strerror(reason)), 1};
}

}  // namespace

void handle_signals() {
  on(SIGPIPE, SIG_IGN);
  on(SIGBUS, on_bus_error);
  // One that was ignored stays so: that is how nohup and shells in the background ask for it.
  for (const int signal_number : {SIGINT, SIGTERM}) {
    struct sigaction before = {};
    sigaction(signal_number, nullptr, &before);
    if (before.sa_handler != SIG_IGN) on(signal_number, on_interruption);
  }
}

void interruptions_wait() { waits = true; }

int interruption() { return came; }

void check_interruption() {
  if (came != 0) throw Interrupted{};
}

void print(std::string_view text) {
  while (!text.empty()) {
    if (came != 0) {
      // What is finished still goes out, but not to a reader that has stopped reading.
      pollfd output = {STDOUT_FILENO, POLLOUT, 0};
      if (poll(&output, 1, kGraceMilliseconds) == 0) throw Interrupted{};
    }
    // After an interruption no more than poll promises to be taken without blocking.
    const size_t count = came != 0 ? std::min<size_t>(text.size(), PIPE_BUF) : text.size();
    const ssize_t written = write(STDOUT_FILENO, text.data(), count);
    if (written >= 0) {
      text.remove_prefix(static_cast<size_t>(written));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      pollfd output = {STDOUT_FILENO, POLLOUT, 0};
      poll(&output, 1, kGraceMilliseconds);
    } else if (errno == EPIPE) {
      throw ReaderLeft{};
    } else if (errno != EINTR) {
      throw output_error(errno);
    }
  }
}

void finish_printing() {
  if (close(STDOUT_FILENO) != 0 && errno != EINTR) throw output_error(errno);
}

void say(std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    text.remove_prefix(static_cast<size_t>(written));
  }
}

}  // namespace nanogpt
