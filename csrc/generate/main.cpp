// nanogpt-generate: write text from an exported model, without Python and without libtorch.
//
//   check the flags -> map the model -> check every byte, read tokenizer and prompt meanwhile
//   -> compute the prompt -> draw, show, until the end
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "engine/decoder.h"
#include "engine/error.h"
#include "engine/generator.h"
#include "engine/model_file.h"
#include "engine/read_limit.h"
#include "engine/rewards.h"
#include "engine/thread_pool.h"
#include "engine/tokenizer.h"
#include "generate/arguments.h"
#include "generate/bench.h"
#include "generate/inputs.h"
#include "generate/process.h"
#include "generate/torchscript_source.h"
#include "generate/writing.h"

namespace nanogpt {
namespace {

// Without a seed: below 2^62, as the Python command takes one.
uint64_t fresh_seed() {
  std::random_device device;
  return (static_cast<uint64_t>(device()) << 32 | device()) >> 2;
}

std::unique_ptr<Reward> make_reward(const Arguments& arguments,
                                    const std::vector<std::string>& terms,
                                    const Tokenizer& tokenizer) {
  std::vector<WeightedReward> parts;
  if (arguments.reward_chars) parts.push_back({char_reward(tokenizer, *arguments.reward_chars)});
  if (!terms.empty()) parts.push_back({term_reward(tokenizer, terms)});
  return parts.empty() ? nullptr : sum_reward(std::move(parts));
}

// Runs `check` beside `work` and waits for both. What `check` throws goes first: an input that is
// damaged explains whatever else went wrong with it.
template <typename Check, typename Work>
void run_beside(Check check, Work work) {
  std::exception_ptr damage, other;
  std::thread beside([&] {
    try {
      check();
    } catch (...) {
      damage = std::current_exception();
    }
  });
  try {
    work();
  } catch (...) {
    other = std::current_exception();
  }
  beside.join();
  if (damage) std::rethrow_exception(damage);
  if (other) std::rethrow_exception(other);
}

int bench(const Arguments& arguments, const ModelFile& file, LogitsSource& source,
          const Decoder* decoder, Clock::time_point started) {
  BenchSubject subject;
  subject.load_ms = 1e3 * seconds_since(started);
  subject.path = arguments.model;
  subject.engine = decoder != nullptr ? "native" : "torchscript";
  if (decoder != nullptr) subject.instruction_set = decoder->instruction_set();
  subject.quantization = file.quantization();
  for (const auto& [name, tensor] : file.weights().tensors) {
    subject.weight_bytes += tensor.bytes;
    const bool scales = name.size() > 6 && name.compare(name.size() - 6, 6, ".scale") == 0;
    if (!scales) subject.parameters += static_cast<int64_t>(tensor.bytes / bytes_of(tensor.dtype));
  }
  if (decoder != nullptr) {
    const int threads = arguments.threads > 0 ? arguments.threads : usable_cpus();
    subject.read_limit = 1 / seconds_to_read(file.weights(), threads, 10);
  }
  const auto results = run_bench(source, arguments.repetitions, arguments.seed.value_or(0));
  const int threads = decoder != nullptr ? decoder->threads() : arguments.threads;
  print(arguments.json ? bench_json(subject, results, threads)
                       : bench_table(subject, results, threads));
  return 0;
}

// What is loaded.
struct Loaded {
  explicit Loaded(const std::string& path) : file(path) {}
  ModelFile file;
  std::unique_ptr<Tokenizer> tokenizer;
  std::unique_ptr<Decoder> decoder;           // --engine native
  std::unique_ptr<LogitsSource> torchscript;  // --engine torchscript
};

int generate(const Arguments& arguments, Clock::time_point started) {
  // Never freed: the process ends with it, and taking maps of tokens and merges apart takes longer
  // than drawing a token.
  auto& [file, tokenizer, decoder, torchscript] = *new Loaded(arguments.model);
  const Config& config = file.weights().config;
  const int threads = arguments.threads > 0 ? arguments.threads : usable_cpus();

  std::string prompt;
  std::vector<int32_t> ids;
  std::vector<std::string> terms;
  run_beside([&] { file.verify(threads); },
             [&] {
               if (arguments.engine == Engine::native) {
                 decoder = std::make_unique<Decoder>(file.weights(), arguments.threads);
               }
               if (arguments.bench) return;
               if (file.tokenizer_json().empty()) {
                 throw InputError(visible(arguments.model) +
                                  " holds no tokenizer, so it cannot write text");
               }
               tokenizer = Tokenizer::from_json(file.tokenizer_json());
               if (tokenizer->vocab_size() != config.vocab_size) {
                 throw InputError(visible(arguments.model) + " is damaged: its tokenizer has " +
                                  std::to_string(tokenizer->vocab_size()) +
                                  " tokens, its weights have " + std::to_string(config.vocab_size));
               }
               if (arguments.reward_terms) terms = read_terms(*arguments.reward_terms);
               prompt = arguments.file ? read_text(*arguments.file, "the prompt")
                                       : arguments.prompt.value_or("");
               ids = tokenizer->encode(prompt);
               if (ids.empty()) ids.push_back(tokenizer->end_of_text_id());
             });
  if (arguments.engine == Engine::torchscript) {
    torchscript = open_torchscript(file, arguments.model, arguments.threads, arguments.trust);
  }
  LogitsSource& source = decoder != nullptr ? static_cast<LogitsSource&>(*decoder) : *torchscript;
  interruptions_wait();
  if (arguments.bench) return bench(arguments, file, source, decoder.get(), started);

  GenerateOptions options;
  options.max_new_tokens = arguments.max_new_tokens;
  options.filters = arguments.filters;
  options.seed = arguments.seed ? *arguments.seed : fresh_seed();
  options.beta = arguments.beta;
  if (!arguments.ignore_eos) options.eos = tokenizer->end_of_text_id();
  options.calibration_temperature = file.calibration_temperature().value_or(1.0);
  options.probabilities = arguments.json || arguments.confidence;
  const std::unique_ptr<Reward> reward = make_reward(arguments, terms, *tokenizer);
  if (!arguments.json) print(prompt);
  const Written written = write_text(source, *tokenizer, ids, options, reward.get(),
                                     arguments.stops, !arguments.json, started);
  print(arguments.json ? as_json(written, ids.size(), options.seed) : "\n");
  if (arguments.confidence) {
    say(confidence_table(written, *tokenizer, file.calibration_temperature()));
  }
  if (!arguments.json) say(timings_line(written, ids.size(), options.seed));
  if (written.interrupted) throw Interrupted{};
  return 0;
}

int complain(const std::string& sentence, int code) {
  std::string line = "nanogpt-generate: ";
  for (const char c : sentence) {
    // A path may hold anything, and must neither break the line nor command the terminal.
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      line += visible({&c, 1});
    } else {
      line += c;
    }
  }
  say(line + "\n");
  return code;
}

int run(int count, const char* const* words, Clock::time_point started) {
  try {
    handle_signals();
    const Arguments arguments = parse_arguments(count, words);
    int code = 0;
    if (arguments.help) {
      print(help_text());
    } else if (arguments.version) {
      print("nanogpt-generate " NANOGPT_VERSION "\n");
    } else {
      code = generate(arguments, started);
    }
    finish_printing();
    return code;
  } catch (const ReaderLeft&) {
    return 0;
  } catch (const Interrupted&) {
    say("interrupted\n");
    return 128 + interruption();
  } catch (const Error& error) {
    return complain(error.what(), error.exit_code);
  } catch (const std::bad_alloc&) {
    return complain("out of memory", 1);
  } catch (const std::length_error&) {
    return complain("out of memory", 1);
  } catch (const std::system_error& error) {
    return complain(error.what(), 1);
  } catch (const std::exception& error) {
    return complain(std::string(error.what()) + " (this is a bug of nanogpt)", 1);
  }
}

}  // namespace
}  // namespace nanogpt

int main(int count, char** words) {
  const auto started = nanogpt::Clock::now();
  // Not return: nothing here is left to be tidied up, and libtorch takes its time.
  _exit(nanogpt::run(count, words, started));
}
