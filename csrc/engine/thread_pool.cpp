#include "engine/thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "engine/error.h"

namespace nanogpt {

namespace {

// Between two tokens a thread waits awake, because waking one takes longer than a token of a small
// model; after this many turns (about a fifth of a millisecond) it sleeps.
constexpr int kTurnsAwake = 4000;
// At a barrier the others are about to come; if they are not, another program has the CPU.
constexpr int kTurnsAtBarrier = 2000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How many forks lie between this process and the one that loaded the program: a child has none of
// its parent's threads.
std::atomic<uint64_t> forks{0};

void count_forks() {
  static const int counted = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)counted;
}

}  // namespace

int usable_cpus() {
#if defined(__linux__)
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return count;
  }
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count == 0 ? 1 : static_cast<int>(count);
}

struct ThreadPool::State {
  explicit State(int size) : size(size), progress(static_cast<size_t>(size)) {}

  const int size;
  const uint64_t born = forks.load();
  std::vector<std::thread> threads;

  bool has_threads() const { return born == forks.load(std::memory_order_relaxed); }
  void end() {
    stop = true;
    start_round();
    for (std::thread& thread : threads) thread.join();
  }

  // A run: written by the caller before `round` moves on.
  Task task = nullptr;
  void* context = nullptr;
  int active = 0;
  bool stop = false;

  alignas(64) std::atomic<uint64_t> round{0};
  // How far each thread is. Everyone writes only a line of his own and reads the others': one
  // transfer between caches where a shared counter would take two.
  struct alignas(64) Progress {
    std::atomic<uint64_t> shown{0};
    uint64_t mine = 0;
  };
  std::vector<Progress> progress;

  std::mutex mutex;
  std::condition_variable woken;
  std::atomic<int> asleep{0};

  void start_round() {
    // Sequentially consistent with the sleepers' count: either a sleeper sees the new round before
    // it waits, or it is counted here and woken.
    round.fetch_add(1, std::memory_order_seq_cst);
    if (asleep.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      woken.notify_all();
    }
  }

  uint64_t next_round(uint64_t seen) {
    for (int turn = 0; turn < kTurnsAwake; ++turn) {
      const uint64_t now = round.load(std::memory_order_acquire);
      if (now != seen) return now;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    asleep.fetch_add(1, std::memory_order_seq_cst);
    woken.wait(lock, [&] { return round.load(std::memory_order_seq_cst) != seen; });
    asleep.fetch_sub(1, std::memory_order_seq_cst);
    return round.load(std::memory_order_acquire);
  }

  void work(int thread) {
    uint64_t seen = 0;
    while (true) {
      seen = next_round(seen);
      if (stop) return;
      begin(thread, seen);
      if (thread < active) task(context, thread, active);
      progress[static_cast<size_t>(thread)].shown.store(end_of(seen), std::memory_order_release);
    }
  }

  // Barriers of round r are counted from r * 2^20 on.
  static uint64_t start_of(uint64_t round) { return round << 20; }
  static uint64_t end_of(uint64_t round) { return start_of(round) + (1 << 20) - 1; }
  void begin(int thread, uint64_t round) {
    progress[static_cast<size_t>(thread)].mine = start_of(round);
  }

  void wait_for(int thread, uint64_t moment, Ahead ahead) {
    const std::atomic<uint64_t>& shown = progress[static_cast<size_t>(thread)].shown;
    for (int turn = 0; shown.load(std::memory_order_acquire) < moment; ++turn) {
      if (ahead.bytes > 0) {
        ahead.fetch(4);
      } else {
        turn < kTurnsAtBarrier ? pause() : std::this_thread::yield();
      }
    }
  }
};

std::unique_ptr<ThreadPool::State> ThreadPool::started(int size) {
  auto state = std::make_unique<State>(size);
  state->threads.reserve(static_cast<size_t>(size));
  try {
    for (int thread = 1; thread < size; ++thread) {
      state->threads.emplace_back([s = state.get(), thread] { s->work(thread); });
    }
  } catch (const std::system_error&) {
    const size_t some = state->threads.size() + 1;
    state->end();
    throw UsageError("this system gives " + std::to_string(some) + " threads, not " +
                     std::to_string(size));
  }
  return state;
}

ThreadPool::ThreadPool(int threads) {
  count_forks();
  state_ = started(threads < 1 ? 1 : threads);
}

ThreadPool::~ThreadPool() {
  if (state_->has_threads()) {
    state_->end();
  } else {
    (void)state_.release();  // threads that are not there cannot be joined
  }
}

int ThreadPool::size() const { return state_->size; }

void ThreadPool::run(Task task, void* context, int threads) {
  if (!state_->has_threads()) {
    auto fresh = started(state_->size);
    (void)state_.release();
    state_ = std::move(fresh);
  }
  State& s = *state_;
  s.active = threads < 1 ? 1 : (threads > s.size ? s.size : threads);
  if (s.active == 1) {
    // The others are not even woken.
    task(context, 0, 1);
    return;
  }
  s.task = task;
  s.context = context;
  s.start_round();
  const uint64_t round = s.round.load(std::memory_order_relaxed);
  s.begin(0, round);
  task(context, 0, s.active);
  for (int thread = 1; thread < s.size; ++thread) s.wait_for(thread, State::end_of(round), {});
}

void ThreadPool::barrier(int thread, Ahead ahead) {
  State& s = *state_;
  if (s.active == 1) return;
  State::Progress& own = s.progress[static_cast<size_t>(thread)];
  own.shown.store(++own.mine, std::memory_order_release);
  for (int other = 0; other < s.active; ++other) {
    if (other != thread) s.wait_for(other, own.mine, ahead);
  }
}

}  // namespace nanogpt
