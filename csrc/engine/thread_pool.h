// One pool of threads that work in lockstep: a task is run by all of them, with barriers inside.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace nanogpt {

// CPUs that this process may use (its affinity mask), at least 1.
int usable_cpus();

class ThreadPool {
 public:
  // Thread 0 is the caller's own; `threads` - 1 more are started.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  int size() const;
  // Calls task(context, thread, threads) on `threads` <= size() threads and returns when all are
  // done. One run at a time.
  using Task = void (*)(void* context, int thread, int threads);
  void run(Task task, void* context, int threads);
  // Waits inside a task until all threads of the run have come.
  void barrier();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace nanogpt
