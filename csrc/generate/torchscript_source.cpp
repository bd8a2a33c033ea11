#include "generate/torchscript_source.h"

#include <dlfcn.h>
#include <glob.h>
#include <unistd.h>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif

#include <climits>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "engine/error.h"
#include "generate/inputs.h"
#include "generate/plugin.h"
#include "generate/torchscript_check.h"

namespace nanogpt {
namespace {

constexpr size_t kErrorBytes = 1024;

// The folder of this program, links followed; empty where the system does not say.
std::string own_folder() {
  char path[PATH_MAX] = {};
#ifdef __APPLE__
  char linked[PATH_MAX] = {};
  uint32_t size = sizeof linked;
  if (_NSGetExecutablePath(linked, &size) != 0 || realpath(linked, path) == nullptr) return "";
#else
  if (readlink("/proc/self/exe", path, sizeof path - 1) <= 0) return "";
#endif
  const std::string whole = path;
  return whole.substr(0, whole.rfind('/'));
}

// Where `make build` and an installed package may have put it, in this order.
std::vector<std::string> places() {
  const std::string folder = own_folder();
  if (folder.empty()) return {};
  std::vector<std::string> found = {folder + "/" NANOGPT_PLUGIN_FILE,
                                    folder + "/../lib/nanogpt/" NANOGPT_PLUGIN_FILE};
  glob_t matches = {};
  const std::string pattern = folder + "/../lib/python*/site-packages/nanogpt/" NANOGPT_PLUGIN_FILE;
  if (glob(pattern.c_str(), 0, nullptr, &matches) == 0) {
    for (size_t i = 0; i < matches.gl_pathc; ++i) found.emplace_back(matches.gl_pathv[i]);
  }
  globfree(&matches);
  return found;
}

std::string find_plugin() {
  if (const char* named = std::getenv("NANOGPT_PLUGIN"); named != nullptr && *named != '\0') {
    // dlopen looks for a name without a slash elsewhere than in the working directory.
    const bool has_slash = std::strchr(named, '/') != nullptr;
    if (access(named, R_OK) == 0) return has_slash ? named : "./" + std::string(named);
    throw UsageError("NANOGPT_PLUGIN names " + visible(named) + ", which cannot be read");
  }
  for (const std::string& place : places()) {
    if (access(place.c_str(), R_OK) == 0) return place;
  }
  throw UsageError(
      "--engine torchscript needs the plug-in " NANOGPT_PLUGIN_FILE
      ", which is neither beside this program nor in its environment: `make build` builds it, "
      "NANOGPT_PLUGIN=PATH names one elsewhere");
}

const NanogptPlugin& load_plugin(const std::string& path) {
  // Lazily, so that a plug-in for another torch can still say which one it was built for. Never
  // unloaded: libtorch does not survive that.
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = dlerror();
    throw UsageError("the plug-in " + visible(path) + " cannot be loaded: " +
                     visible(reason != nullptr ? reason : "no reason given") +
                     "; `make build` builds it against the torch that is installed");
  }
  const auto function =
      reinterpret_cast<NanogptPluginFunction>(dlsym(library, NANOGPT_PLUGIN_SYMBOL));
  const NanogptPlugin* plugin = function != nullptr ? function() : nullptr;
  if (plugin == nullptr) throw UsageError(visible(path) + " is not a plug-in of nanogpt");
  if (plugin->abi != NANOGPT_PLUGIN_ABI) {
    throw UsageError("the plug-in " + visible(path) + " has interface " +
                     std::to_string(plugin->abi) + ", this program has " +
                     std::to_string(NANOGPT_PLUGIN_ABI) + ": build both with `make build`");
  }
  char loaded[64] = {};
  plugin->loaded_torch(loaded, sizeof loaded);
  if (std::string(loaded) != plugin->built_torch) {
    throw UsageError("the plug-in " + visible(path) + " was built against torch " +
                     plugin->built_torch + ", but torch " + visible(loaded) +
                     " is installed: run `make build` again");
  }
  return *plugin;
}

class TorchScriptSource : public LogitsSource {
 public:
  TorchScriptSource(const NanogptPlugin& plugin, const ModelFile& file, const std::string& path,
                    int threads)
      : plugin_(plugin),
        config_(file.weights().config),
        logits_(static_cast<size_t>(config_.vocab_size)) {
    char error[kErrorBytes] = {};
    const std::string_view bytes = file.bytes();
    if (plugin_.open(bytes.data(), bytes.size(), threads, &model_, error, sizeof error) != 0) {
      throw InputError("torch cannot open " + visible(path) + ": " + visible(error));
    }
  }
  ~TorchScriptSource() override { plugin_.close(model_); }
  TorchScriptSource(const TorchScriptSource&) = delete;
  TorchScriptSource& operator=(const TorchScriptSource&) = delete;

  const Config& config() const override { return config_; }
  int64_t length() const override { return plugin_.length(model_); }

  const float* append(const int32_t* tokens, int64_t count) override {
    if (count < 1 || count > config_.block_size - length()) {
      throw UsageError("a context of " + std::to_string(length()) + " tokens and " +
                       std::to_string(count) + " more do not fit the model's " +
                       std::to_string(config_.block_size));
    }
    for (int64_t i = 0; i < count; ++i) {
      if (tokens[i] < 0 || tokens[i] >= config_.vocab_size) {
        throw UsageError("token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                         std::to_string(config_.vocab_size));
      }
    }
    char error[kErrorBytes] = {};
    if (plugin_.append(model_, tokens, count, logits_.data(), config_.vocab_size, error,
                       sizeof error) != 0) {
      throw Error("torch failed: " + visible(error), 1);
    }
    return logits_.data();
  }

  void reset() override {
    char error[kErrorBytes] = {};
    if (plugin_.reset(model_, error, sizeof error) != 0) {
      throw Error("torch failed: " + visible(error), 1);
    }
  }

 private:
  const NanogptPlugin& plugin_;
  const Config config_;
  void* model_ = nullptr;
  std::vector<float> logits_;
};

}  // namespace

std::unique_ptr<LogitsSource> open_torchscript(const ModelFile& file, const std::string& path,
                                               int threads, bool trust) {
  if (!trust) {
    const std::string foreign = foreign_program(file, path);
    if (!foreign.empty()) {
      throw UsageError(visible(path) + " is a program that nanogpt export did not write, because " +
                       foreign + ": nothing was run; --trust runs whatever it does, and --engine " +
                       "native runs nothing of it");
    }
  }
  return std::make_unique<TorchScriptSource>(load_plugin(find_plugin()), file, path, threads);
}

}  // namespace nanogpt
