// The TorchScript plug-in of nanogpt-generate: an archive of `export` run by libtorch.
//
// The archive's methods keep the cache: prefill(tokens (1, T)) -> (1, V) begins a context anew,
// decode(tokens (1, 1)) -> (1, V) adds one token, reset() empties it.
#include "generate/plugin.h"

#include <ATen/Parallel.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <dlfcn.h>
#include <torch/script.h>
#include <torch/version.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

namespace {

constexpr char kBuiltTorch[] = C10_STRINGIZE(TORCH_VERSION_MAJOR) "." C10_STRINGIZE(
    TORCH_VERSION_MINOR) "." C10_STRINGIZE(TORCH_VERSION_PATCH);

struct Model {
  torch::jit::Module module;
  torch::jit::Method prefill, decode, clear;
  int64_t length = 0;
};

// What went wrong, in one line: the first, or the last where the interpreter wraps it in a trace of
// the archive's code.
int fail(const std::exception& problem, char* error, size_t size) {
  std::string sentence = problem.what();
  if (const auto* torch_problem = dynamic_cast<const c10::Error*>(&problem)) {
    sentence = torch_problem->what_without_backtrace();
  }
  while (!sentence.empty() && sentence.back() == '\n') sentence.pop_back();
  if (sentence.rfind("The following operation failed", 0) == 0) {
    sentence = sentence.substr(sentence.rfind('\n') + 1);
  }
  sentence = sentence.substr(0, sentence.find('\n'));
  if (size > 0) std::snprintf(error, size, "%s", sentence.c_str());
  return 1;
}

void loaded_torch(char* version, size_t size) {
  // Asked for by name: an older torch lacks the function, and that must not end the process. Its
  // three highest bytes are the version.
  using Function = uint64_t (*)();
  const auto function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "aoti_torch_abi_version"));
  if (function == nullptr) {
    std::snprintf(version, size, "unknown");
    return;
  }
  const uint64_t number = function();
  const auto byte = [&](int shift) { return static_cast<unsigned>(number >> shift & 0xFF); };
  std::snprintf(version, size, "%u.%u.%u", byte(56), byte(48), byte(40));
}

// The archive as it lies in memory: what was checked is what is read, whatever becomes of the file.
class Bytes final : public caffe2::serialize::ReadAdapterInterface {
 public:
  Bytes(const void* bytes, size_t count) : bytes_(static_cast<const char*>(bytes)), count_(count) {}
  size_t size() const override { return count_; }
  size_t read(uint64_t at, void* out, size_t count, const char*) const override {
    if (at >= count_) return 0;
    count = std::min(count, count_ - static_cast<size_t>(at));
    std::memcpy(out, bytes_ + at, count);
    return count;
  }

 private:
  const char* bytes_;
  size_t count_;
};

int open_model(const void* bytes, size_t count, int threads, void** model, char* error,
               size_t size) {
  try {
    if (threads > 0) at::set_num_threads(threads);
    torch::jit::Module module =
        torch::jit::load(std::make_shared<Bytes>(bytes, count), torch::kCPU, false);
    module.eval();
    *model = new Model{module, module.get_method("prefill"), module.get_method("decode"),
                       module.get_method("reset")};
    return 0;
  } catch (const std::exception& problem) {
    return fail(problem, error, size);
  }
}

// Runs one method on ids (1, T); gives its logits (1, V).
at::Tensor call(torch::jit::Method& method, const std::vector<int64_t>& ids) {
  const at::Tensor tokens =
      torch::tensor(ids, torch::kInt64).reshape({1, static_cast<int64_t>(ids.size())});
  return method({tokens}).toTensor();
}

int append(void* opaque, const int32_t* tokens, int64_t count, float* logits, int64_t vocab_size,
           char* error, size_t size) {
  try {
    Model& model = *static_cast<Model*>(opaque);
    const c10::InferenceMode inference;
    at::Tensor out;
    if (model.length == 0) {
      out = call(model.prefill, std::vector<int64_t>(tokens, tokens + count));
      model.length = count;
    } else {
      for (int64_t i = 0; i < count; ++i) {
        out = call(model.decode, {tokens[i]});
        ++model.length;
      }
    }
    out = out.to(torch::kFloat32).contiguous();
    TORCH_CHECK(out.dim() == 2 && out.size(0) == 1 && out.size(1) == vocab_size,
                "the archive gives logits of another shape than its index says");
    std::memcpy(logits, out.data_ptr<float>(), static_cast<size_t>(vocab_size) * sizeof(float));
    return 0;
  } catch (const std::exception& problem) {
    return fail(problem, error, size);
  }
}

int reset(void* opaque, char* error, size_t size) {
  try {
    Model& model = *static_cast<Model*>(opaque);
    model.clear({});
    model.length = 0;
    return 0;
  } catch (const std::exception& problem) {
    return fail(problem, error, size);
  }
}

int64_t length(const void* model) { return static_cast<const Model*>(model)->length; }

void close_model(void* model) { delete static_cast<Model*>(model); }

constexpr NanogptPlugin kPlugin = {
    NANOGPT_PLUGIN_ABI, kBuiltTorch, loaded_torch, open_model, append, reset, length, close_model,
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const NanogptPlugin*
nanogpt_torchscript_plugin() {
  return &kPlugin;
}
