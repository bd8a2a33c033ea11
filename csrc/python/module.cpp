// nanogpt._C: the engine, the tokenizers, the rewards and the sampler in Python.
//
// Weights are shared with whoever gave them, never copied; logits are given as new arrays. The GIL
// is released while something is computed, and one mutex an engine keeps two threads apart.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/decoder.h"
#include "engine/error.h"
#include "engine/generator.h"
#include "engine/model_file.h"
#include "engine/rewards.h"
#include "engine/sampler.h"
#include "engine/softmax_moments.h"
#include "engine/text.h"
#include "engine/thread_pool.h"
#include "engine/tokenizer.h"
#include "engine/weights.h"
#include "python/training_module.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using nanogpt::Config;
using nanogpt::Decoder;
using nanogpt::DType;
using nanogpt::Filters;
using nanogpt::Generator;
using nanogpt::InputError;
using nanogpt::ModelFile;
using nanogpt::Sampler;
using nanogpt::Step;
using nanogpt::StopText;
using nanogpt::Tokenizer;
using nanogpt::UsageError;
using nanogpt::Utf8Stream;
using nanogpt::Weights;

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;

// (log_total, mean, variance), each (n, K), of z (n, V) at betas (K,) or (n, K).
py::tuple moments_of(const Doubles& z, const Doubles& betas, int threads) {
  const bool shared = betas.ndim() == 1;
  if (z.ndim() != 2 || z.shape(1) < 1 || betas.ndim() < 1 || betas.ndim() > 2 ||
      (!shared && betas.shape(0) != z.shape(0)) || betas.shape(betas.ndim() - 1) > 1000) {
    throw UsageError("z is (n, V) and betas (K,) or (n, K), with V at least 1 and K at most 1000");
  }
  if (threads < 1) throw UsageError("threads must be 1 or more");
  const int64_t rows = z.shape(0), count = betas.shape(betas.ndim() - 1);
  Doubles out[3];
  for (Doubles& each : out) each = Doubles({rows, count});
  double* to[3] = {out[0].mutable_data(), out[1].mutable_data(), out[2].mutable_data()};
  const double *from = z.data(), *by = betas.data();
  {
    py::gil_scoped_release release;
    nanogpt::softmax_moments(from, rows, z.shape(1), by, static_cast<int>(count),
                             shared ? 0 : count, threads, to[0], to[1], to[2]);
  }
  return py::make_tuple(out[0], out[1], out[2]);
}

// Ids from a list or an integer array of one dimension, each checked before it becomes 32 bits.
std::vector<int32_t> ids_of(const py::handle& object, int64_t vocab_size) {
  py::array given = py::array::ensure(object);
  if (!given) {
    PyErr_Clear();
    throw py::value_error("tokens must be a list or an array of whole numbers");
  }
  if (given.ndim() != 1) throw py::value_error("tokens must have one dimension");
  if (given.size() == 0) return {};
  const char kind = given.dtype().kind();
  if (kind != 'i' && kind != 'u') throw py::value_error("tokens must be whole numbers");
  // An id above int64 wraps to a negative one, which is refused below.
  const auto wide = py::array_t<int64_t, py::array::c_style | py::array::forcecast>(given);
  const auto values = wide.unchecked<1>();
  std::vector<int32_t> ids(static_cast<size_t>(values.shape(0)));
  for (py::ssize_t i = 0; i < values.shape(0); ++i) {
    if (values(i) < 0 || values(i) >= vocab_size) {
      throw UsageError("token " + std::to_string(values(i)) + " is outside the vocabulary of " +
                       std::to_string(vocab_size));
    }
    ids[static_cast<size_t>(i)] = static_cast<int32_t>(values(i));
  }
  return ids;
}

// UTF-8 of a str, or the bytes as they are.
std::string utf8_of(const py::handle& text) {
  if (PyBytes_Check(text.ptr())) return py::reinterpret_borrow<py::bytes>(text);
  if (!PyUnicode_Check(text.ptr())) throw py::type_error("text must be a str or bytes");
  Py_ssize_t size = 0;
  const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
  if (data != nullptr) return std::string(data, static_cast<size_t>(size));
  py::error_already_set error;
  if (!error.matches(PyExc_UnicodeEncodeError)) throw error;
  // Half of a character, which no vocabulary has.
  const py::object at = error.value().attr("start");
  const py::object type = py::module_::import("nanogpt.tokenizer").attr("UnknownCharacterError");
  const py::object unknown = type(text[at], at);
  PyErr_SetObject(type.ptr(), unknown.ptr());
  throw py::error_already_set();
}

Filters filters_of(double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
                   std::optional<double> min_p, double repetition_penalty) {
  Filters filters{temperature, top_k, top_p, min_p, repetition_penalty};
  filters.check();
  return filters;
}

int64_t whole_number(const py::dict& config, const char* name) {
  if (!config.contains(name)) throw InputError(std::string("the configuration lacks ") + name);
  try {
    return config[name].cast<int64_t>();
  } catch (const py::cast_error&) {
    throw InputError(std::string("the configuration's ") + name + " is not a whole number");
  }
}

Config config_of(const py::dict& given) {
  Config config;
  config.vocab_size = whole_number(given, "vocab_size");
  config.block_size = whole_number(given, "block_size");
  config.n_layer = whole_number(given, "n_layer");
  config.n_head = whole_number(given, "n_head");
  config.n_embd = whole_number(given, "n_embd");
  config.bias = given.contains("bias") && py::bool_(given["bias"]);
  config.rotary = given.contains("rotary") && py::bool_(given["rotary"]);
  config.qk_norm = given.contains("qk_norm") && py::bool_(given["qk_norm"]);
  return config;
}

// A view of a Python buffer; `dtype` says what 16 bits mean, as Python has no word for bfloat16.
nanogpt::Tensor tensor_of(const std::string& name, const py::buffer_info& info,
                          std::optional<std::string> dtype) {
  const std::string format = info.format;
  if (!dtype) {
    if (format == "f") dtype = "float32";
    if (format == "b") dtype = "int8";
    if (!dtype) {
      throw UsageError("tensor " + name + ": elements of format '" + format +
                       "' need a dtype: bfloat16 as 16-bit whole numbers");
    }
  }
  const std::optional<DType> known = nanogpt::dtype_named(*dtype);
  if (!known) throw UsageError("tensor " + name + ": there is no dtype " + *dtype);
  const size_t width = nanogpt::bytes_of(*known);
  if (static_cast<size_t>(info.itemsize) != width) {
    throw UsageError("tensor " + name + ": elements of " + std::to_string(info.itemsize) +
                     " bytes are not " + *dtype);
  }
  nanogpt::Tensor tensor;
  tensor.dtype = *known;
  size_t elements = 1;
  for (py::ssize_t axis = info.ndim; axis-- > 0;) {
    if (info.shape[axis] > 1 && info.strides[axis] != static_cast<py::ssize_t>(elements * width)) {
      throw UsageError("tensor " + name + " must be contiguous, in row-major order");
    }
    elements *= static_cast<size_t>(info.shape[axis]);  // no more than the buffer holds
  }
  if (reinterpret_cast<uintptr_t>(info.ptr) % width != 0) {
    throw UsageError("tensor " + name + " does not lie at a multiple of its element's size");
  }
  tensor.shape.assign(info.shape.begin(), info.shape.end());
  tensor.data = info.ptr;
  tensor.bytes = elements * width;
  return tensor;
}

int32_t id_of(int64_t token, int64_t vocab_size) {
  if (token < 0 || token >= vocab_size) {
    throw UsageError("token " + std::to_string(token) + " is outside the vocabulary of " +
                     std::to_string(vocab_size));
  }
  return static_cast<int32_t>(token);
}

// A reward with the tokenizers that it reads.
class RewardObject {
 public:
  using Tokenizers = std::vector<std::shared_ptr<const Tokenizer>>;

  RewardObject(std::unique_ptr<nanogpt::Reward> reward, Tokenizers tokenizers)
      : tokenizers_(std::move(tokenizers)), reward_(std::move(reward)) {}

  size_t vocab_size() const { return reward_->vocab_size(); }
  nanogpt::Reward& reward() const { return *reward_; }
  const Tokenizers& tokenizers() const { return tokenizers_; }
  RewardObject copy() const { return RewardObject(reward_->clone(), tokenizers_); }

  Doubles candidates() {
    const double* values = reward_->of_candidates();
    Doubles out(static_cast<py::ssize_t>(vocab_size()));
    std::copy(values, values + vocab_size(), out.mutable_data());
    return out;
  }

  void advance(int64_t token) {
    reward_->advance(id_of(token, static_cast<int64_t>(vocab_size())));
  }

 private:
  Tokenizers tokenizers_;  // before the reward, so that they go last
  std::unique_ptr<nanogpt::Reward> reward_;
};

// Python tells them apart by their classes.
struct TokenRewardObject : RewardObject {
  using RewardObject::RewardObject;
};
struct CharRewardObject : RewardObject {
  using RewardObject::RewardObject;
};
struct TermRewardObject : RewardObject {
  using RewardObject::RewardObject;
};
struct SumRewardObject : RewardObject {
  using RewardObject::RewardObject;
};

std::vector<double> token_rewards_of(const py::handle& object) {
  const auto values = PyCallable_Check(object.ptr()) ? Doubles() : Doubles::ensure(object);
  if (!values || values.ndim() != 1 || values.shape(0) < 1) {
    PyErr_Clear();
    throw py::type_error(
        "a reward of the native engine is one of its own objects or a number for every id, (V,); "
        "functions are for engine=\"torch\"");
  }
  return std::vector<double>(values.data(), values.data() + values.shape(0));
}

// A reward of its own for one text, or nothing for None.
std::unique_ptr<RewardObject> reward_of(const py::handle& object) {
  if (object.is_none()) return nullptr;
  if (py::isinstance<RewardObject>(object)) {
    return std::make_unique<RewardObject>(object.cast<const RewardObject&>().copy());
  }
  return std::make_unique<RewardObject>(nanogpt::token_reward(token_rewards_of(object)),
                                        RewardObject::Tokenizers());
}

class TokenStream;

// A model that is ready to compute.
class Engine {
 public:
  Engine(const std::string& path, int threads, bool verify) {
    check_threads(threads);
    py::gil_scoped_release release;
    file_ = std::make_unique<ModelFile>(path);
    if (verify) file_->verify(threads > 0 ? threads : nanogpt::usable_cpus());
    weights_ = file_->weights();
    tokenizer_json_ = file_->tokenizer_json();
    calibration_ = file_->calibration_temperature();
    quantization_ = file_->quantization();
    start(threads);
  }

  Engine(const py::dict& config, const py::dict& tensors, const py::dict& dtypes, int threads,
         const std::string& tokenizer_json, std::optional<double> calibration) {
    check_threads(threads);
    weights_.config = config_of(config);
    buffers_.reserve(tensors.size());
    for (const auto& [key, value] : tensors) {
      const auto name = py::cast<std::string>(key);
      if (!py::isinstance<py::buffer>(value)) {
        throw UsageError("tensor " + name + " is not an array");
      }
      buffers_.push_back(py::reinterpret_borrow<py::buffer>(value).request());
      std::optional<std::string> dtype;
      if (dtypes.contains(key)) dtype = py::cast<std::string>(dtypes[key]);
      const nanogpt::Tensor tensor = tensor_of(name, buffers_.back(), dtype);
      if (tensor.dtype == DType::i8) quantization_ = "int8";
      if (tensor.dtype == DType::bf16 && quantization_ != "int8") quantization_ = "bf16";
      weights_.tensors.emplace(name, tensor);
    }
    tokenizer_json_ = tokenizer_json;
    calibration_ = calibration;
    py::gil_scoped_release release;
    start(threads);
  }

  const Config& config() const { return weights_.config; }

  py::dict config_dict() const {
    const Config& c = config();
    return py::dict("vocab_size"_a = c.vocab_size, "block_size"_a = c.block_size,
                    "n_layer"_a = c.n_layer, "n_head"_a = c.n_head, "n_embd"_a = c.n_embd,
                    "bias"_a = c.bias, "rotary"_a = c.rotary, "qk_norm"_a = c.qk_norm);
  }

  int threads() const { return decoder_->threads(); }
  const char* instruction_set() const { return decoder_->instruction_set(); }
  const std::string& quantization() const { return quantization_; }
  std::optional<double> calibration() const { return calibration_; }
  const std::string& tokenizer_json() const { return tokenizer_json_; }

  // Made when it is first asked for: a large vocabulary takes longer to read than the model.
  std::shared_ptr<Tokenizer> tokenizer() {
    if (!tokenizer_ && !tokenizer_json_.empty()) {
      std::shared_ptr<Tokenizer> made = Tokenizer::from_json(tokenizer_json_);
      if (made->vocab_size() != config().vocab_size) {
        throw InputError("the tokenizer has " + std::to_string(made->vocab_size()) +
                         " ids, the model " + std::to_string(config().vocab_size));
      }
      tokenizer_ = std::move(made);
    }
    return tokenizer_;
  }

  int64_t length() {
    const auto turn = take_turn();
    return decoder_->length();
  }

  void reset() {
    const auto turn = take_turn();
    begin();
  }

  Floats logits(const py::handle& tokens) {
    const auto ids = some_ids(tokens);
    const auto count = static_cast<py::ssize_t>(ids.size());
    check_context(static_cast<int64_t>(ids.size()));  // before memory is asked for
    Floats out({count, static_cast<py::ssize_t>(config().vocab_size)});
    float* data = out.mutable_data();
    {
      const auto turn = take_turn();
      begin();
      decoder_->append_all(ids.data(), count, data);
    }
    return out;
  }

  Floats prefill(const py::handle& tokens) {
    const auto ids = some_ids(tokens);
    Floats out(static_cast<py::ssize_t>(config().vocab_size));
    append(ids, out, true);
    return out;
  }

  Floats decode(int64_t token) {
    const int32_t id = id_of(token, config().vocab_size);
    Floats out(static_cast<py::ssize_t>(config().vocab_size));
    append({id}, out, false);
    return out;
  }

  std::vector<int32_t> some_ids(const py::handle& tokens) const {
    auto ids = ids_of(tokens, config().vocab_size);
    if (ids.empty()) throw UsageError("tokens must hold at least one token");
    return ids;
  }

 private:
  friend class TokenStream;

  // The GIL is let go before the mutex is waited for, so that whoever has it can finish.
  struct Turn {
    py::gil_scoped_release release;
    std::unique_lock<std::recursive_mutex> lock;
  };
  std::unique_ptr<Turn> take_turn() {
    auto turn = std::make_unique<Turn>();
    turn->lock = std::unique_lock<std::recursive_mutex>(mutex_);
    return turn;
  }

  static void check_threads(int threads) {
    if (threads < 0) throw UsageError("threads must be at least 0");
  }

  void check_context(int64_t tokens) const {
    if (tokens > config().block_size) {
      throw UsageError(std::to_string(tokens) + " tokens do not fit the context of " +
                       std::to_string(config().block_size));
    }
  }

  void start(int threads) {
    nanogpt::check(weights_);
    decoder_ = std::make_unique<Decoder>(weights_, threads);
  }

  // The context is begun anew, so that an unfinished stream cannot go on.
  void begin() {
    ++era_;
    decoder_->reset();
  }

  void append(const std::vector<int32_t>& ids, Floats& out, bool anew) {
    float* data = out.mutable_data();
    const auto turn = take_turn();
    if (anew) {
      begin();
    } else {
      ++era_;
    }
    const float* logits = decoder_->append(ids.data(), static_cast<int64_t>(ids.size()));
    std::copy(logits, logits + config().vocab_size, data);
  }

  std::vector<py::buffer_info> buffers_;  // of from_tensors: keep Python's memory where it is
  std::unique_ptr<ModelFile> file_;       // of a path
  Weights weights_;
  std::string tokenizer_json_;
  std::shared_ptr<Tokenizer> tokenizer_;
  std::optional<double> calibration_;
  std::string quantization_ = "none";
  std::unique_ptr<Decoder> decoder_;  // after what it points into, so that it goes first
  std::recursive_mutex mutex_;        // a signal handler of Python may come back in
  uint64_t era_ = 0;
};

// The new tokens of one text, as an iterator. It owns the engine's context until something else
// uses the engine.
class TokenStream {
 public:
  TokenStream(std::shared_ptr<Engine> engine, std::vector<int32_t> prompt,
              const nanogpt::GenerateOptions& options, std::unique_ptr<RewardObject> reward)
      : engine_(std::move(engine)),
        prompt_(std::move(prompt)),
        options_(options),
        reward_(std::move(reward)) {}

  // Takes the engine's context.
  void begin() {
    const auto turn = engine_->take_turn();
    begin_in_turn();
  }

  bool probabilities() const { return options_.probabilities; }

  // Reward, log Z and KL of the token that was given last.
  std::optional<std::tuple<double, double, double>> details() const {
    if (!options_.details || !last_) return std::nullopt;
    return std::make_tuple(last_->reward, last_->log_z, last_->kl);
  }

  std::optional<Step> next() {
    const auto turn = engine_->take_turn();
    const auto step = next_in_turn();
    if (step) last_ = step;
    return step;
  }

  // The whole text in one turn. Ctrl-C is looked for a few times a second.
  std::vector<Step> all() {
    using Clock = std::chrono::steady_clock;
    std::vector<Step> steps;
    const auto turn = engine_->take_turn();
    begin_in_turn();
    auto looked = Clock::now();
    while (const auto step = next_in_turn()) {
      steps.push_back(*step);
      if (Clock::now() - looked > std::chrono::milliseconds(100)) {
        // The mutex stays ours: nobody waits for it with the GIL.
        py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        looked = Clock::now();
      }
    }
    return steps;
  }

 private:
  void begin_in_turn() {
    engine_->begin();
    era_ = engine_->era_;
    generator_ = std::make_unique<Generator>(*engine_->decoder_, std::move(prompt_), options_,
                                             reward_ ? &reward_->reward() : nullptr);
  }

  std::optional<Step> next_in_turn() {
    if (era_ != engine_->era_) {
      throw std::runtime_error("the engine's context has been used for something else meanwhile");
    }
    return generator_->next();
  }

  std::shared_ptr<Engine> engine_;
  std::vector<int32_t> prompt_;
  nanogpt::GenerateOptions options_;
  std::unique_ptr<RewardObject> reward_;
  std::unique_ptr<Generator> generator_;
  std::optional<Step> last_;
  uint64_t era_ = 0;
};

std::shared_ptr<TokenStream> stream_of(std::shared_ptr<Engine> engine, const py::handle& tokens,
                                       int64_t max_new_tokens, double temperature,
                                       std::optional<int64_t> top_k, std::optional<double> top_p,
                                       std::optional<double> min_p, double repetition_penalty,
                                       uint64_t seed, uint32_t row, std::optional<int64_t> eos,
                                       bool probabilities, const py::handle& reward, double beta,
                                       std::optional<int64_t> reward_top_k, bool details) {
  nanogpt::GenerateOptions options;
  if (max_new_tokens < 0) throw UsageError("max_new_tokens must be at least 0");
  options.max_new_tokens = max_new_tokens;
  options.filters = filters_of(temperature, top_k, top_p, min_p, repetition_penalty);
  options.seed = seed;
  options.row = row;
  // An id that no token has never ends a text, as in Python.
  if (eos && *eos >= 0 && *eos < engine->config().vocab_size) {
    options.eos = static_cast<int32_t>(*eos);
  }
  options.calibration_temperature = engine->calibration().value_or(1.0);
  options.probabilities = probabilities;
  options.beta = beta;
  options.reward_top_k = reward_top_k;
  options.details = details;
  auto prompt = engine->some_ids(tokens);
  return std::make_shared<TokenStream>(std::move(engine), std::move(prompt), options,
                                       reward_of(reward));
}

// What a decoder takes here; asked of one for the smallest model.
std::string instruction_set() {
  const std::vector<float> zeros(64, 0.0F);
  Weights weights;
  weights.config = Config{1, 1, 1, 1, 4, false};
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    size_t elements = 1;
    for (const int64_t size : shape) elements *= static_cast<size_t>(size);
    weights.tensors[name] =
        nanogpt::Tensor{DType::f32, std::move(shape), zeros.data(), elements * sizeof(float)};
  };
  const std::string layer = "transformer.h.0.";
  add("transformer.wte.weight", {1, 4});
  add("transformer.wpe.weight", {1, 4});
  add(layer + "ln_1.weight", {4});
  add(layer + "attn.c_attn.weight", {12, 4});
  add(layer + "attn.c_proj.weight", {4, 4});
  add(layer + "ln_2.weight", {4});
  add(layer + "mlp.c_fc.weight", {16, 4});
  add(layer + "mlp.c_proj.weight", {4, 16});
  add("transformer.ln_f.weight", {4});
  return Decoder(weights, 1).instruction_set();
}

// Python's exceptions of the same meaning, made where they are first needed.
void translate(std::exception_ptr thrown) {
  const char* name = nullptr;
  std::string sentence;
  try {
    if (thrown) std::rethrow_exception(thrown);
    return;
  } catch (const InputError& error) {
    name = "InputError";
    sentence = error.what();
  } catch (const UsageError& error) {
    name = "UsageError";
    sentence = error.what();
  }
  const py::object type = py::module_::import("nanogpt.errors").attr(name);
  // A sentence may quote bytes of a damaged file.
  PyObject* text = PyUnicode_DecodeUTF8(sentence.data(), static_cast<Py_ssize_t>(sentence.size()),
                                        "backslashreplace");
  if (text == nullptr) return;  // Python's own error is set
  PyErr_SetObject(type.ptr(), text);
  Py_DECREF(text);
}

void bind_engine(py::module_& module) {
  py::class_<TokenStream, std::shared_ptr<TokenStream>>(
      module, "TokenStream", "An iterator over (id, probability or None) of one text.")
      .def("__iter__", [](py::object self) { return self; })
      .def("__next__",
           [](TokenStream& self) {
             const auto step = self.next();
             if (!step) throw py::stop_iteration();
             py::object probability = py::none();
             if (self.probabilities()) probability = py::float_(step->probability);
             return py::make_tuple(step->token, probability);
           })
      .def_property_readonly(
          "details", &TokenStream::details,
          "(reward, log Z, KL) of the last token, in nats; None unless asked for.");

  add_training(module);

  py::class_<Engine, std::shared_ptr<Engine>>(
      module, "Engine",
      "A GPT that computes on the CPU without torch.\n\n"
      "V vocabulary, T tokens, block_size tokens of context. One context, which prefill, decode,\n"
      "logits, generate and stream share.")
      .def(py::init<const std::string&, int, bool>(), "path"_a, "threads"_a = 0, py::kw_only(),
           "verify"_a = true,
           "Map an exported model.pt or a .safetensors model file.\n\n"
           "threads=0 chooses by measurement. verify compares every byte that is used with its\n"
           "check sum. Raises InputError where the file is missing, damaged or foreign.")
      .def_static(
          "from_tensors",
          [](const py::dict& config, const py::dict& tensors, const py::dict& dtypes, int threads,
             const std::string& tokenizer_json, std::optional<double> calibration) {
            return std::make_shared<Engine>(config, tensors, dtypes, threads, tokenizer_json,
                                            calibration);
          },
          "config"_a, "tensors"_a, py::kw_only(), "dtypes"_a = py::dict(), "threads"_a = 0,
          "tokenizer_json"_a = "", "calibration_temperature"_a = py::none(),
          "From tensors by their names in the state dict, as contiguous buffers that are "
          "shared.\n\n"
          "float32 and int8 buffers speak for themselves; bfloat16 comes as 16-bit whole numbers\n"
          "with {name: \"bfloat16\"} in dtypes. An int8 matrix has its scales under name.scale.\n"
          "Raises InputError where the tensors do not fit the configuration, UsageError for a\n"
          "buffer that cannot be shared.")
      .def_property_readonly("config", &Engine::config_dict, "The shape, as GPTConfig's fields.")
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("instruction_set", &Engine::instruction_set)
      .def_property_readonly("quantization", &Engine::quantization,
                             "\"none\", \"bf16\" or \"int8\"")
      .def_property_readonly("calibration_temperature", &Engine::calibration)
      .def_property_readonly("tokenizer", &Engine::tokenizer, "The Tokenizer, or None.")
      .def_property_readonly("tokenizer_json", &Engine::tokenizer_json,
                             "Its description as JSON, empty where there is none.")
      .def_property_readonly("length", &Engine::length, "Tokens in the context.")
      .def("reset", &Engine::reset, "Forget the context.")
      .def("logits", &Engine::logits, "tokens"_a,
           "(T, V) float32: the logits after each of T <= block_size tokens, in a new context.")
      .def("prefill", &Engine::prefill, "tokens"_a,
           "(V,) float32: the logits of what follows these tokens, in a new context.")
      .def("decode", &Engine::decode, "token"_a,
           "(V,) float32: the logits of what follows one more token.")
      .def(
          "stream",
          [](std::shared_ptr<Engine> engine, const py::handle& tokens, int64_t max_new_tokens,
             double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
             std::optional<double> min_p, double repetition_penalty, uint64_t seed, uint32_t row,
             std::optional<int64_t> eos, bool probabilities, const py::object& reward, double beta,
             std::optional<int64_t> reward_top_k, bool details) {
            auto stream = stream_of(std::move(engine), tokens, max_new_tokens, temperature, top_k,
                                    top_p, min_p, repetition_penalty, seed, row, eos, probabilities,
                                    reward, beta, reward_top_k, details);
            stream->begin();
            return stream;
          },
          "tokens"_a, "max_new_tokens"_a, py::kw_only(), "temperature"_a = 1.0,
          "top_k"_a = py::none(), "top_p"_a = py::none(), "min_p"_a = py::none(),
          "repetition_penalty"_a = 1.0, "seed"_a, "row"_a = 0, "eos"_a = py::none(),
          "probabilities"_a = false, "reward"_a = py::none(), "beta"_a = 1.0,
          "reward_top_k"_a = py::none(), "details"_a = false,
          "Continue a text, token by token: an iterator over (id, probability or None).\n\n"
          "tokens may be longer than the context. eos ends the text and is not given out. The\n"
          "draw is that of nanogpt.decoding, so the same seed and row give the same text. A\n"
          "stream cannot go on once the engine has been used for something else.\n\n"
          "reward, a Reward or (V,) numbers, times beta (a multiplier: more is greedier) is added\n"
          "to the log-probabilities that the filters left; the object given stays where it is.\n"
          "reward_top_k draws from so many of the likeliest ids alone, where beta is not 0. With\n"
          "details the stream's `details` hold each token's reward, log Z and exact KL.")
      .def(
          "generate",
          [](std::shared_ptr<Engine> engine, const py::handle& tokens, int64_t max_new_tokens,
             double temperature, std::optional<int64_t> top_k, std::optional<double> top_p,
             std::optional<double> min_p, double repetition_penalty, uint64_t seed, uint32_t row,
             std::optional<int64_t> eos, bool probabilities, const py::object& reward, double beta,
             std::optional<int64_t> reward_top_k) {
            const auto stream = stream_of(std::move(engine), tokens, max_new_tokens, temperature,
                                          top_k, top_p, min_p, repetition_penalty, seed, row, eos,
                                          probabilities, reward, beta, reward_top_k, false);
            py::list ids, of_ids;
            for (const Step& step : stream->all()) {
              ids.append(step.token);
              if (probabilities) of_ids.append(step.probability);
            }
            return py::make_tuple(ids, of_ids);
          },
          "tokens"_a, "max_new_tokens"_a, py::kw_only(), "temperature"_a = 1.0,
          "top_k"_a = py::none(), "top_p"_a = py::none(), "min_p"_a = py::none(),
          "repetition_penalty"_a = 1.0, "seed"_a, "row"_a = 0, "eos"_a = py::none(),
          "probabilities"_a = false, "reward"_a = py::none(), "beta"_a = 1.0,
          "reward_top_k"_a = py::none(),
          "As stream, at once: (new ids, their probabilities, empty unless asked for).");
}

void bind_text(py::module_& module) {
  py::class_<Tokenizer, std::shared_ptr<Tokenizer>>(module, "Tokenizer",
                                                    "Text to ids and back, as nanogpt.tokenizer.")
      .def_static(
          "from_json",
          [](const py::handle& json) {
            return std::shared_ptr<Tokenizer>(Tokenizer::from_json(utf8_of(json)));
          },
          "json"_a, "From the JSON of Tokenizer.to_dict. Raises InputError where it is damaged.")
      .def(
          "encode",
          [](const Tokenizer& self, const py::handle& text) {
            const std::string raw = utf8_of(text);
            py::gil_scoped_release release;
            return self.encode(raw);
          },
          "text"_a,
          "Ids of a str or of UTF-8 bytes. Raises InputError for what the vocabulary lacks.")
      .def(
          "decode",
          [](const Tokenizer& self, const py::handle& ids) {
            return self.decode(ids_of(ids, self.vocab_size()));
          },
          "ids"_a, "Text of ids; bytes that are not UTF-8 become U+FFFD.")
      .def(
          "bytes_of",
          [](const Tokenizer& self, int32_t id) {
            return py::bytes(std::string(self.bytes_of(id)));
          },
          "id"_a, "Raw bytes of an id, empty for the special token.")
      .def_property_readonly("vocab_size", &Tokenizer::vocab_size)
      .def_property_readonly("end_of_text_id", &Tokenizer::end_of_text_id);

  py::class_<Utf8Stream>(module, "Utf8Stream", "Bytes to whole characters, as codecs' \"replace\".")
      .def(py::init<>())
      .def(
          "feed",
          [](Utf8Stream& self, const py::bytes& raw) { return self.feed(std::string(raw)); },
          "raw"_a)
      .def("flush", &Utf8Stream::flush);

  py::class_<StopText>(module, "StopText", "As nanogpt.decoding.StopText.")
      .def(py::init<std::vector<std::string>>(), "stops"_a)
      .def(
          "feed", [](StopText& self, const std::string& text) { return self.feed(text); }, "text"_a)
      .def("flush", &StopText::flush)
      .def_property_readonly("found", &StopText::found);
}

void bind_rewards(py::module_& module) {
  py::class_<RewardObject>(module, "Reward",
                           "Rewards of every id that could be written next, V of them.\n\n"
                           "Only what is written counts, never the prompt.")
      .def("candidates", &RewardObject::candidates,
           "(V,) float64: the reward of writing each id next.")
      .def("advance", &RewardObject::advance, "id"_a,
           "Tell which id was written. Raises UsageError for one outside the vocabulary.")
      .def("copy", &RewardObject::copy,
           "The same reward at the same place, which goes on by itself.")
      .def_property_readonly("vocab_size", &RewardObject::vocab_size);

  py::class_<TokenRewardObject, RewardObject>(module, "TokenReward")
      .def(py::init([](const py::handle& values) {
             return TokenRewardObject(nanogpt::token_reward(token_rewards_of(values)), {});
           }),
           "values"_a, "The same (V,) numbers at every step.");
  py::class_<CharRewardObject, RewardObject>(module, "CharReward")
      .def(py::init([](std::shared_ptr<Tokenizer> tokenizer, const std::string& characters) {
             const py::gil_scoped_release release;
             return CharRewardObject(nanogpt::char_reward(*tokenizer, characters), {});
           }),
           "tokenizer"_a.none(false), "characters"_a,
           "1 for an id whose last character is one of these, else 0.\n\n"
           "Raises InputError for a character with which no id ends, and where there is none.");
  py::class_<TermRewardObject, RewardObject>(module, "TermReward")
      .def(
          py::init([](std::shared_ptr<Tokenizer> tokenizer, const std::vector<std::string>& terms) {
            const py::gil_scoped_release release;
            auto reward = nanogpt::term_reward(*tokenizer, terms);
            return TermRewardObject(std::move(reward), {std::move(tokenizer)});
          }),
          "tokenizer"_a.none(false), "terms"_a,
          "Progress through distinct terms, whole words in whatever case, across ids.\n\n"
          "The rewards of a text's ids add up to the terms in it, plus what is unfinished at its\n"
          "end. Raises InputError for a term that the vocabulary cannot write, and for an empty\n"
          "one.");
  py::class_<SumRewardObject, RewardObject>(module, "SumReward")
      .def(py::init([](const std::vector<std::pair<const RewardObject*, double>>& parts) {
             std::vector<nanogpt::WeightedReward> copies;
             RewardObject::Tokenizers tokenizers;
             for (const auto& [part, weight] : parts) {
               if (part == nullptr) throw py::type_error("a part of a sum is a Reward, not None");
               copies.push_back({part->reward().clone(), weight});
               tokenizers.insert(tokenizers.end(), part->tokenizers().begin(),
                                 part->tokenizers().end());
             }
             return SumRewardObject(nanogpt::sum_reward(std::move(copies)), std::move(tokenizers));
           }),
           "parts"_a, "Of (reward, weight): copies of them, which go on together.");
}

// A sampler that checks what Python gives it.
struct CheckedSampler {
  int64_t vocab_size;
  Sampler sampler;

  int32_t next(const Floats& logits, uint32_t position,
               const std::optional<py::array_t<double, py::array::c_style>>& tilt) {
    if (logits.ndim() != 1 || logits.shape(0) != vocab_size ||
        (tilt && (tilt->ndim() != 1 || tilt->shape(0) != vocab_size))) {
      throw py::value_error("logits and tilt must be of shape (" + std::to_string(vocab_size) +
                            ",)");
    }
    return sampler.next(logits.data(), position, tilt ? tilt->data() : nullptr);
  }
};

void bind_sampling(py::module_& module) {
  py::class_<CheckedSampler>(module, "Sampler", "One row's draws, as nanogpt.decoding's.")
      .def(py::init([](int64_t vocab_size, double temperature, std::optional<int64_t> top_k,
                       std::optional<double> top_p, std::optional<double> min_p,
                       double repetition_penalty, uint64_t seed, uint32_t row, uint32_t stream) {
             if (vocab_size < 1 || vocab_size > std::numeric_limits<int32_t>::max()) {
               throw UsageError("vocab_size must be from 1 to 2147483647");
             }
             const Filters filters =
                 filters_of(temperature, top_k, top_p, min_p, repetition_penalty);
             return CheckedSampler{vocab_size, Sampler(vocab_size, filters, seed, row, stream)};
           }),
           "vocab_size"_a, py::kw_only(), "temperature"_a = 1.0, "top_k"_a = py::none(),
           "top_p"_a = py::none(), "min_p"_a = py::none(), "repetition_penalty"_a = 1.0,
           "seed"_a = 0, "row"_a = 0, "stream"_a = 0)
      .def(
          "see",
          [](CheckedSampler& self, const py::handle& tokens) {
            const auto ids = ids_of(tokens, self.vocab_size);
            self.sampler.see(ids.data(), ids.size());
          },
          "tokens"_a, "Mark tokens of the text, for the repetition penalty.")
      .def("next", &CheckedSampler::next, "logits"_a, "position"_a, "tilt"_a = py::none(),
           "The id for the token at `position`, from (V,) float32 logits and, where given, (V,)\n"
           "float64 that are added to the log-probabilities that the filters left.");

  module.def("philox", &nanogpt::philox, "counter"_a, "key"_a,
             "Philox4x32-10: four words for a counter of four and a key of two.");
  module.def("gumbel", &nanogpt::gumbel, "seed"_a, "id"_a, "position"_a, "row"_a, "stream"_a,
             "-log(-log u) of one id at one place.");
  module.def("window_start", &nanogpt::window_start, "length"_a, "block_size"_a);
  module.def(
      "softmax_moments", &moments_of, "z"_a, "betas"_a, py::kw_only(), "threads"_a = 1,
      "(log_total, mean, variance), each (n, K) float64: log-sum-exp of beta z, and mean and\n"
      "variance of z under softmax(beta z), of every row of z (n, V) at betas (K,) or (n, K),\n"
      "all above 0. The largest number of a row is 0; the others may be -inf.");
  module.def("usable_cpus", &nanogpt::usable_cpus, "CPUs that this process may use.");
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The native engine; see nanogpt.native, which is its door.";
  module.attr("__version__") = NANOGPT_VERSION;
  py::register_exception_translator(&translate);
  module.def("instruction_set", &instruction_set,
             "What this processor is used with; NANOGPT_ISA forces one.");
  bind_engine(module);
  bind_text(module);
  bind_rewards(module);
  bind_sampling(module);
}
