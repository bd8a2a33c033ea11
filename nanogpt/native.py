"""The door to the compiled engine, nanogpt._C: GPTs on the CPU, without torch in the loop.

It is built by `pip install` where there is a C++ compiler; everything works without it, only
slower. Nothing here imports it before it is asked for.
"""

import dataclasses
import functools
import importlib
import json
import os
import shutil
import sysconfig
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanogpt import __version__

if TYPE_CHECKING:
    from nanogpt import _C
    from nanogpt._C import Engine
    from nanogpt.config import GPTConfig
    from nanogpt.model import GPT
    from nanogpt.tokenizer import Tokenizer

PROGRAM = "nanogpt-generate"
PLUGIN = "nanogpt_torchscript.so"
EXPORT_SUFFIX = ".pt"


def available() -> bool:
    """Whether the engine is here."""
    return not why_not()


def why_not() -> str:
    """Why the engine is not here, in words; "" where it is."""
    return _load()[1]


def describe() -> str:
    """The engine's version, instruction set and processors; needs `available()`.

    Raises: UsageError where NANOGPT_ISA names what this processor lacks.
    """
    module = _load()[0]
    return f"{module.__version__}, {module.instruction_set()}, up to {module.usable_cpus()} threads"


def compiler() -> str | None:
    """The C++ compiler that a build would take, or None."""
    named = os.environ.get("CXX", "").split()
    names = named[:1] or ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def program() -> Path | None:
    """The generation binary of this environment, or None."""
    own = Path(sysconfig.get_path("scripts"), PROGRAM)
    found = own if own.is_file() else shutil.which(PROGRAM)
    return None if found is None else Path(found)


def plugin() -> Path | None:
    """The TorchScript plug-in of the generation binary, or None."""
    path = Path(__file__).with_name(PLUGIN)
    return path if path.is_file() else None


def unfit(model: "GPT") -> str | None:
    """Why the engine cannot compute this model where it is, in words, or None."""
    if not available():
        return why_not()
    weight = model.token_weight
    if weight.device.type != "cpu":
        return f"it computes on the CPU, and the model is on {weight.device}"
    other = next((t.dtype for t in model.parameters() if t.dtype != torch.float32), None)
    if other is not None:
        return f"it shares float32 weights, and the model has {str(other).removeprefix('torch.')}"
    return None


def engine_for(model: "GPT", threads: int = 0) -> "Engine":
    """An engine that computes with the model's own tensors; they are shared, not copied.

    One engine is kept for a model until its weights have moved or changed.

    Args:
        model: float32, on the CPU.
        threads: 0 chooses by measurement.
    Raises: RuntimeError where it cannot, with the reason.
    """
    reason = unfit(model)
    if reason is not None:
        raise RuntimeError(f"the native engine cannot run this model: {reason}")
    tensors = dict(model.named_parameters())
    # Torch counts the changes of every tensor, but not of those made in inference mode.
    state = (
        threads,
        model.calibration_temperature,
        *((t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors.values()),
    )
    kept = _engines.get(model)
    if (
        kept is not None
        and kept[0] == state
        and not any(t.is_inference() for t in tensors.values())
    ):
        return kept[1]
    engine: Engine = _load()[0].Engine.from_tensors(
        model.describe()["config"],
        {name: t.detach().contiguous().numpy() for name, t in tensors.items()},
        threads=threads,
        calibration_temperature=model.calibration_temperature,
    )
    _engines[model] = (state, engine)
    return engine


def training_step(
    shape: "GPTConfig",
    parameters: dict[str, Any],
    *,
    bf16: bool,
    threads: int,
    recompute: bool = False,
) -> "_C.TrainingStep":
    """The compiled training step over shared arrays; needs `available()`.

    Args:
        parameters: (weight, gradient) of each name in the state dict, contiguous float32.
        bf16: the operands of products are rounded to bfloat16.
        recompute: layers are computed once more in the backward pass.
    Raises: UsageError where it cannot run; see `training_unfit`.
    """
    module = _load()[0]
    made: _C.TrainingStep = module.TrainingStep(
        dataclasses.asdict(shape), parameters, bf16=bf16, threads=threads, recompute=recompute
    )
    return made


def training_instruction_set(*, bf16: bool) -> str:
    """The instruction set of the compiled training step; needs `available()`."""
    name: str = _load()[0].TrainingStep.instruction_set_of(bf16=bf16)
    return name


def training_unfit(shape: "GPTConfig", *, bf16: bool) -> str:
    """Why the compiled training step cannot run such a model here, or ""; needs `available()`."""
    reason: str = _load()[0].TrainingStep.unfit(dataclasses.asdict(shape), bf16=bf16)
    return reason


def softmax_moments(z: torch.Tensor, betas: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Log-sum-exp of beta z, and mean and variance of z under softmax(beta z); each (n, K).

    Args:
        z: (n, V) float64 on the CPU; the largest number of a row is 0, others may be -inf.
        betas: (K,) or (n, K) float64, all above 0.
    """
    found = _load()[0].softmax_moments(
        z.contiguous().numpy(), betas.contiguous().numpy(), threads=torch.get_num_threads()
    )
    return tuple(map(torch.from_numpy, found))


def turn(model: "GPT") -> "threading.RLock":
    """To be held while the model's engine writes: it has one context, whoever asks."""
    return _turns.setdefault(model, threading.RLock())


def open_file(path: str | os.PathLike[str], threads: int = 0) -> "Engine":
    """An engine that maps an exported model.pt, or a .safetensors model file.

    Every byte that is used has been compared with its check sum.

    Raises: InputError where the file is missing, damaged or foreign; RuntimeError where there is
        no engine, with the reason.
    """
    module, reason = _load()
    if reason:
        raise RuntimeError(reason)
    engine: Engine = module.Engine(os.fspath(path), threads)
    return engine


def tokenizer_for(tokenizer: "Tokenizer") -> "_C.Tokenizer":
    """The compiled tokenizer of the same vocabulary; needs `available()`. One is kept for each."""
    kept = _tokenizers.get(tokenizer)
    if kept is None:
        kept = _load()[0].Tokenizer.from_json(json.dumps(tokenizer.to_dict()))
        _tokenizers[tokenizer] = kept
    return kept


def token_reward(values: Sequence[float]) -> "_C.Reward":
    """The same (V,) numbers at every step; needs `available()`."""
    made: _C.Reward = _load()[0].TokenReward(values)
    return made


def char_reward(characters: str, tokenizer: "Tokenizer") -> "_C.Reward":
    """1 for an id whose last whole character is one of these, else 0; needs `available()`.

    Raises: InputError for a character with which no id ends.
    """
    made: _C.Reward = _load()[0].CharReward(tokenizer_for(tokenizer), characters)
    return made


def term_reward(terms: Sequence[str], tokenizer: "Tokenizer") -> "_C.Reward":
    """Progress through distinct terms, from the start of a text; needs `available()`.

    Raises: InputError for an empty term and for one that the vocabulary cannot write.
    """
    made: _C.Reward = _load()[0].TermReward(tokenizer_for(tokenizer), list(terms))
    return made


def sum_reward(parts: "Sequence[tuple[_C.Reward, float]]") -> "_C.Reward":
    """The sum of (reward, weight), of copies from where they stand; needs `available()`."""
    made: _C.Reward = _load()[0].SumReward(list(parts))
    return made


_engines: "weakref.WeakKeyDictionary[GPT, tuple[tuple[Any, ...], Engine]]"
_engines = weakref.WeakKeyDictionary()
_tokenizers: "weakref.WeakKeyDictionary[Tokenizer, _C.Tokenizer]" = weakref.WeakKeyDictionary()
_turns: "weakref.WeakKeyDictionary[GPT, threading.RLock]" = weakref.WeakKeyDictionary()


@functools.cache
def _load() -> tuple[Any, str]:
    """The module and "", or None and the reason."""
    again = "pip install --force-reinstall --no-deps . in the source folder builds it"
    try:
        module = importlib.import_module("nanogpt._C")
    except ModuleNotFoundError:
        if compiler() is None:
            return None, f"it was not built: there is no C++ compiler; with one, {again}"
        return None, f"it was not built; {again}, and with -v shows what fails"
    except ImportError as error:  # built for other libraries than those that are here
        return None, f"it does not load ({error}); {again}"
    if module.__version__ != __version__:
        return (
            None,
            f"it was built for version {module.__version__}, this is {__version__}; {again}",
        )
    return module, ""
