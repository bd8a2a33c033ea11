// One pool of threads that work in lockstep: a task is run by all of them, with barriers inside.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace nanogpt {

// CPUs that this process may use (its affinity mask), at least 1.
int usable_cpus();

// Bytes that a thread is going to read: fetched into its cache while it would wait.
struct Ahead {
  const char* at = nullptr;
  int64_t bytes = 0;
  void fetch(int lines) {
    for (int i = 0; i < lines && bytes > 0; ++i, at += 64, bytes -= 64) {
      __builtin_prefetch(at, 0, 2);
    }
  }
};

class ThreadPool {
 public:
  // Thread 0 is the caller's own; `threads` - 1 more are started. Throws UsageError where the
  // system gives fewer. In the child of a fork the next run starts them anew.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  int size() const;
  // Calls task(context, thread, threads) on `threads` <= size() threads and returns when all are
  // done. One run at a time.
  using Task = void (*)(void* context, int thread, int threads);
  void run(Task task, void* context, int threads);
  // Waits inside a task until all threads of the run have come.
  void barrier(int thread, Ahead ahead = {});

 private:
  struct State;
  static std::unique_ptr<State> started(int size);
  std::unique_ptr<State> state_;
};

}  // namespace nanogpt
