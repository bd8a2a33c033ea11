// nanogpt._C.TrainingStep: loss, gradients and AdamW in Python. Arrays are shared, never copied.
#include "python/training_module.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "engine/training.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using nanogpt::Trained;
using nanogpt::TrainingShape;
using nanogpt::UsageError;
// No forcecast: an array that would have to be copied is refused, since nothing would come back.
using Numbers = py::array_t<float, py::array::c_style>;
using Ids = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

float* numbers_of(const std::string& name, const py::handle& object, int64_t count) {
  if (!py::isinstance<Numbers>(object)) {
    throw UsageError(name + " must be a contiguous array of float32");
  }
  auto array = py::reinterpret_borrow<Numbers>(object);
  if (!array.writeable()) throw UsageError(name + " cannot be written");
  if (array.size() != count) {
    throw UsageError(name + " has " + std::to_string(array.size()) + " numbers, not " +
                     std::to_string(count));
  }
  return array.mutable_data();
}

TrainingShape shape_of(const py::dict& given) {
  const auto whole = [&](const char* name) { return given[name].cast<int64_t>(); };
  const auto positive = [&](const char* name) {
    const int64_t value = whole(name);
    if (value < 1) throw UsageError(std::string(name) + " must be 1 or more");
    return value;
  };
  const auto flag = [&](const char* name) {
    return given.contains(name) && given[name].cast<bool>();
  };
  TrainingShape shape;
  shape.config.vocab_size = positive("vocab_size");
  shape.config.block_size = positive("block_size");
  shape.config.n_layer = positive("n_layer");
  shape.config.n_head = positive("n_head");
  shape.config.n_embd = positive("n_embd");
  if (shape.config.n_embd % shape.config.n_head != 0) {
    throw UsageError("n_embd is not a multiple of n_head");
  }
  shape.config.bias = flag("bias");
  shape.config.rotary = flag("rotary");
  shape.config.qk_norm = flag("qk_norm");
  if (given.contains("dropout")) shape.dropout = given["dropout"].cast<float>();
  return shape;
}

class Step {
 public:
  Step(const py::dict& shape, const py::dict& parameters, bool bf16, int threads, bool recompute) {
    if (threads < 1) throw UsageError("threads must be 1 or more");
    std::vector<Trained> trained;
    for (const auto& [key, value] : parameters) {
      const auto name = py::cast<std::string>(key);
      const auto pair = py::cast<std::pair<py::object, py::object>>(value);
      const auto count = static_cast<int64_t>(py::len(pair.first.attr("ravel")()));
      trained.push_back({name, count, numbers_of(name, pair.first, count),
                         numbers_of("the gradient of " + name, pair.second, count)});
      kept_.push_back(pair.first);
      kept_.push_back(pair.second);
    }
    step_ =
        std::make_unique<nanogpt::TrainingStep>(shape_of(shape), trained, bf16, threads, recompute);
  }

  double gradients(const Ids& windows, double scale, bool add, uint64_t dropout_seed) {
    const auto [batch, positions] = size_of(windows);
    const int64_t* ids = windows.data();
    return alone([&] { return step_->gradients(ids, batch, positions, scale, add, dropout_seed); });
  }

  double loss(const Ids& windows) {
    const auto [batch, positions] = size_of(windows);
    const int64_t* ids = windows.data();
    return alone([&] { return step_->loss(ids, batch, positions); });
  }

  double gradient_norm() {
    return alone([&] { return step_->gradient_norm(); });
  }

  void adamw(const py::dict& moments, double lr, double beta1, double beta2, double eps,
             double weight_decay, int64_t count, double grad_scale) {
    nanogpt::AdamW by;
    by.lr = static_cast<float>(lr);
    by.beta1 = static_cast<float>(beta1);
    by.beta2 = static_cast<float>(beta2);
    by.eps = static_cast<float>(eps);
    by.weight_decay = static_cast<float>(weight_decay);
    by.correction1 = static_cast<float>(1.0 - std::pow(beta1, static_cast<double>(count)));
    by.correction2 = static_cast<float>(1.0 - std::pow(beta2, static_cast<double>(count)));
    by.grad_scale = static_cast<float>(grad_scale);
    struct Update {
      size_t index;
      float *first, *second;
    };
    std::vector<Update> updates;  // all of them are looked at before any weight changes
    for (const auto& [key, value] : moments) {
      const size_t index = index_of(key);
      const Trained& parameter = step_->parameters()[index];
      const auto pair = py::cast<std::pair<py::object, py::object>>(value);
      updates.push_back(
          {index, numbers_of("the first moment of " + parameter.name, pair.first, parameter.count),
           numbers_of("the second moment of " + parameter.name, pair.second, parameter.count)});
    }
    alone([&] {
      for (const Update& each : updates) step_->adamw(each.index, each.first, each.second, by);
      return 0.0;
    });
  }

  void muon(const py::dict& momenta, double lr, double momentum, double weight_decay,
            double grad_scale) {
    std::vector<nanogpt::MuonMatrix> matrices;
    for (const auto& [key, value] : momenta) {
      const size_t index = index_of(key);
      const Trained& parameter = step_->parameters()[index];
      const auto pair = py::cast<std::pair<py::object, int64_t>>(value);
      float* at = numbers_of("the momentum of " + parameter.name, pair.first, parameter.count);
      const auto array = py::reinterpret_borrow<Numbers>(pair.first);
      if (array.ndim() != 2 || pair.second < 1 || array.shape(0) % pair.second != 0 ||
          array.shape(1) % 2 != 0 || array.shape(0) / pair.second % 2 != 0) {
        throw UsageError(parameter.name + " is no stack of matrices with even sides");
      }
      matrices.push_back({index, array.shape(0), array.shape(1), pair.second, at});
    }
    const nanogpt::Muon by{static_cast<float>(lr), static_cast<float>(momentum),
                           static_cast<float>(weight_decay), static_cast<float>(grad_scale)};
    alone([&] {
      step_->muon(matrices, by);
      return 0.0;
    });
  }

  py::array_t<uint8_t> dropout_masks() const {
    const std::vector<uint8_t> masks = step_->dropout_masks();
    return py::array_t<uint8_t>(static_cast<py::ssize_t>(masks.size()), masks.data());
  }
  int64_t workspace_bytes() const { return step_->workspace_bytes(); }
  const char* instruction_set() const { return step_->instruction_set(); }
  int threads() const { return step_->threads(); }

 private:
  size_t index_of(const py::handle& key) const {
    const auto name = py::cast<std::string>(key);
    const std::vector<Trained>& parameters = step_->parameters();
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (parameters[i].name == name) return i;
    }
    throw UsageError("there is no parameter " + name);
  }

  static std::pair<int64_t, int64_t> size_of(const Ids& windows) {
    if (windows.ndim() != 2 || windows.shape(1) < 2) {
      throw UsageError("windows must be (B, T + 1) ids");
    }
    return {windows.shape(0), windows.shape(1) - 1};
  }

  template <typename Function>
  double alone(Function function) {
    const py::gil_scoped_release release;
    const std::lock_guard<std::mutex> turn(mutex_);
    return function();
  }

  std::vector<py::object> kept_;
  std::mutex mutex_;
  std::unique_ptr<nanogpt::TrainingStep> step_;
};

}  // namespace

void add_training(py::module_& module) {
  py::class_<Step>(module, "TrainingStep",
                   "The loss of a GPT, its gradients and AdamW on the CPU, without torch.\n\n"
                   "B windows of T + 1 ids; the last T of each are the targets. Results do not\n"
                   "depend on the number of threads.")
      .def(py::init<const py::dict&, const py::dict&, bool, int, bool>(), "shape"_a, "parameters"_a,
           py::kw_only(), "bf16"_a, "threads"_a, "recompute"_a = false,
           "shape: GPTConfig's fields. parameters: (weight, gradient) of each\n"
           "name in the state dict, contiguous float32 arrays that are shared. bf16: operands of\n"
           "products are rounded to bfloat16. recompute: layers are computed once more in the\n"
           "backward pass, which takes less memory. Raises UsageError where that cannot run here.")
      .def_static(
          "instruction_set_of",
          [](bool bf16) {
            const nanogpt::TrainingKernels* kernels = nanogpt::training_kernels(bf16);
            return std::string(kernels != nullptr ? kernels->name : "");
          },
          py::kw_only(), "bf16"_a, "The instruction set that is taken here, or \"\".")
      .def_static(
          "unfit",
          [](const py::dict& shape, bool bf16) {
            return nanogpt::TrainingStep::unfit(shape_of(shape), bf16);
          },
          "shape"_a, py::kw_only(), "bf16"_a, "Why it cannot run here, or \"\".")
      .def_property_readonly("instruction_set", &Step::instruction_set)
      .def_property_readonly("threads", &Step::threads)
      .def_property_readonly("workspace_bytes", &Step::workspace_bytes,
                             "What the passes so far have made room for.")
      .def("gradients", &Step::gradients, "windows"_a, py::kw_only(), "scale"_a = 1.0,
           "add"_a = false, "dropout_seed"_a = 0,
           "The mean loss in nats; gradients of scale times it are written, or added.\n"
           "With dropout, what is dropped is a function of the seed.")
      .def("dropout_masks", &Step::dropout_masks,
           "What the last gradients kept (1) or dropped (0): (2 L + 1, N, C) numbers in a row.")
      .def("loss", &Step::loss, "windows"_a, "The mean loss in nats.")
      .def("gradient_norm", &Step::gradient_norm, "Euclidean, of all gradients.")
      .def("adamw", &Step::adamw, "moments"_a, py::kw_only(), "lr"_a, "beta1"_a, "beta2"_a, "eps"_a,
           "weight_decay"_a, "count"_a, "grad_scale"_a = 1.0,
           "Step `count` (from 1) of AdamW for the parameters in `moments`, {name: (first,\n"
           "second)}, float32 arrays that are updated; gradients times grad_scale.")
      .def("muon", &Step::muon, "momenta"_a, py::kw_only(), "lr"_a, "momentum"_a, "weight_decay"_a,
           "grad_scale"_a = 1.0,
           "A step of Muon for the matrices in `momenta`, {name: (momentum, parts)}: float32\n"
           "arrays that are updated, of so many matrices one below the other.");
}
