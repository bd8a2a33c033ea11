"""Whether an archive computes what the model does: eager, TorchScript and native, side by side.

The texts are real ones: what the tokenizer makes of letters drawn from its vocabulary, and what the
model itself writes on from there. They stand at both ends of the context: one token, a few, all of
it, and past its end, where the window restarts.

Tolerances are parts of the largest logit of the eager model, in float32 and on the weights that the
file holds. float32 against float32 differs by the order of sums alone: 1e-4 is a hundred times what
was seen. Beside narrow weights the native engine keeps keys and values in bfloat16, 2 L roundings
in a model of L layers; with bfloat16 weights it may round what enters the 4 L + 1 products as well.
(With int8 weights what enters is int16, which is finer by far.) Half a step of bfloat16 is 2^-9.
Independent errors add up as the root of their number, and twice that is allowed. Trained models
took a sixth to a half of it; attention that is all but one-hot, as from large random weights, makes
roundings of keys larger and can go beyond it, where --no-verify or --quantize none is left.
"""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from nanogpt.cache import KVCache
from nanogpt.decoding import window_start
from nanogpt.errors import NanoGPTError, UsageError
from nanogpt.export import torchscript
from nanogpt.export.quantize import dequantized_model
from nanogpt.model import GPT

_EXACT = 1e-4
_HALF_STEP = 2.0**-9
_SHORT, _WRITTEN = 8, 24


@dataclass(frozen=True)
class Agreement:
    """How far two engines are apart.

    Attributes:
        pair: which ones.
        largest: the largest difference of two logits.
        scale: the largest logit.
        tolerance: the largest `largest / scale` that is accepted.
        choices, same_choices: places compared, and those where both put the same token first.
    """

    pair: str
    largest: float
    scale: float
    tolerance: float
    choices: int
    same_choices: int

    @property
    def holds(self) -> bool:
        # Written so that NaN fails.
        return self.largest <= self.tolerance * self.scale

    def in_words(self) -> str:
        """The comparison in one sentence."""
        apart = self.largest / self.scale if self.scale else self.largest
        return (
            f"{self.pair}: logits differ by at most {self.largest:.2e}, {apart:.1e} of the largest "
            f"(tolerance {self.tolerance:.1e}); the same token is first at {self.same_choices:,} "
            f"of {self.choices:,} places"
        )


class Engine(Protocol):
    """What is compared."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T,) -> (T, V), without a context before it."""

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T,) -> (V,): forgets, and reads these tokens."""

    def decode(self, token: int) -> torch.Tensor:
        """One more token -> (V,)."""


class Eager:
    """The model in Python, with its own cache."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.cache = KVCache(model.config, 1, dtype=torch.float32, device=torch.device("cpu"))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        out, _ = self.model(tokens[None])
        return out[0]

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        self.cache.reset()
        return self.model.next_logits(tokens[None], self.cache)[0]

    def decode(self, token: int) -> torch.Tensor:
        return self.model.next_logits(torch.tensor([[token]]), self.cache)[0]


class Script:
    """The archive through libtorch, which runs it: for what this process has just written."""

    def __init__(self, path: Path) -> None:
        self.module = torchscript.load(path, trust=True)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.module(tokens[None])[0]

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.module.prefill(tokens[None])[0]

    def decode(self, token: int) -> torch.Tensor:
        return self.module.decode(torch.tensor([[token]]))[0]


class Native:
    """The archive through the compiled engine, `native` being its module."""

    def __init__(self, native: Any, path: Path) -> None:
        self.engine = native.Engine(str(path))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.engine.logits(tokens.numpy()))

    def prefill(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.engine.prefill(tokens.numpy()))

    def decode(self, token: int) -> torch.Tensor:
        return torch.as_tensor(self.engine.decode(token))


def tolerance(pair: tuple[str, str], quantize: str, n_layer: int) -> float:
    """The largest accepted difference of two engines, as a part of the largest logit."""
    if quantize == "none" or "native" not in pair:
        return _EXACT
    roundings = 6 * n_layer + 1 if quantize == "bf16" else 2 * n_layer + 1
    return 2 * _HALF_STEP * math.sqrt(roundings)


def compare(model: GPT, quantize: str, path: Path) -> tuple[list[Agreement], str | None]:
    """Compare every pair of engines on the same texts.

    Args:
        model: what was exported, on any device.
        path: the archive, just written by this process: its program is run.
    Returns: a row for each pair, and why the native engine was left out, or None.
    Raises: NanoGPTError where an engine cannot read the archive at all.
    """
    plain = dequantized_model(model, quantize)
    engines: dict[str, Engine] = {"eager": Eager(plain), "torchscript": _opened(Script, path)}
    note = None
    try:
        native = importlib.import_module("nanogpt._C")
    except ImportError:
        note = "the native engine is not built here, so it was not compared"
    else:
        engines["native"] = _opened(lambda where: Native(native, where), path)
    with torch.inference_mode():
        seen = _logits_of_all(engines, texts(plain), model.config.block_size)
    scale = float(seen["eager"].abs().max())
    names = list(engines)
    rows = []
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            a, b = seen[one], seen[other]
            same = int((a.argmax(-1) == b.argmax(-1)).sum())
            allowed = tolerance((one, other), quantize, model.config.n_layer)
            # max of a tensor with NaN is NaN, which no tolerance accepts.
            largest = float((a - b).abs().max())
            rows.append(Agreement(f"{one} / {other}", largest, scale, allowed, len(a), same))
    return rows, note


def texts(model: GPT) -> list[torch.Tensor]:
    """Ids of texts (T,), the longest a little longer than the context."""
    size, block = model.config.vocab_size, model.config.block_size
    generator = torch.Generator().manual_seed(20)
    drawn = torch.randint(size, (block + _SHORT,), generator=generator)
    if model.tokenizer is not None:
        # Letters, as they would be typed; a drawn byte that is no UTF-8 becomes U+FFFD.
        try:
            typed = model.tokenizer.encode(model.tokenizer.decode(drawn.tolist()))
        except ValueError:  # a character vocabulary without U+FFFD, where none can arise
            typed = []
        drawn = torch.cat([torch.tensor(typed, dtype=torch.int64), drawn])[: len(drawn)]
    short = drawn[: min(_SHORT, block)]
    written = model.generate(short[None], _WRITTEN, temperature=0.0)[0]
    # The end of the context: what was drawn before what the model wrote, and three tokens more.
    filled = torch.cat([drawn, written])[-max(1, block - 1) :]
    full = model.generate(filled[None], 3, temperature=0.0)[0]
    return [torch.tensor([size - 1]), short, written, full]


def _logits_of_all(
    engines: Mapping[str, Engine], all_texts: Sequence[torch.Tensor], block_size: int
) -> dict[str, torch.Tensor]:
    """Every engine's logits at every place, (places, V)."""
    out = {}
    for name, engine in engines.items():
        places = [logits for text in all_texts for logits in _walk(engine, text, block_size)]
        out[name] = torch.cat([p if p.dim() == 2 else p[None] for p in places]).to(torch.float64)
    return out


def _walk(engine: Engine, text: torch.Tensor, block_size: int) -> Iterator[torch.Tensor]:
    """The context at once, then a start of it and the last few tokens one by one, past its end."""
    yield engine.logits(text[:block_size]).clone()
    read_from = -1
    for end in range(max(1, len(text) - 3), len(text) + 1):
        start = window_start(end, block_size)
        if start != read_from:
            read_from = start
            yield engine.prefill(text[start:end]).clone()
        else:
            yield engine.decode(int(text[end - 1])).clone()


def _opened(make: Any, path: Path) -> Any:
    try:
        return make(path)
    except UsageError:  # NANOGPT_ISA names what this processor lacks
        raise
    except Exception as error:
        summary = str(error).partition("\n")[0]
        raise NanoGPTError(f"what was exported cannot be read back: {summary}") from error
