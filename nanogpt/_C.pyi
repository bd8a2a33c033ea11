from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Ids = Sequence[int] | NDArray[np.integer[Any]]

__version__: str

class TokenStream(Iterator[tuple[int, float | None]]):
    def __iter__(self) -> TokenStream: ...
    def __next__(self) -> tuple[int, float | None]: ...
    @property
    def details(self) -> tuple[float, float, float] | None: ...

class Tokenizer:
    @staticmethod
    def from_json(json: str | bytes) -> Tokenizer: ...
    def encode(self, text: str | bytes) -> list[int]: ...
    def decode(self, ids: _Ids) -> str: ...
    def bytes_of(self, id: int) -> bytes: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text_id(self) -> int: ...

class TrainingStep:
    def __init__(
        self,
        shape: dict[str, Any],
        parameters: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
        *,
        bf16: bool,
        threads: int,
        recompute: bool = False,
    ) -> None: ...
    @staticmethod
    def instruction_set_of(*, bf16: bool) -> str: ...
    @staticmethod
    def unfit(shape: dict[str, Any], *, bf16: bool) -> str: ...
    @property
    def instruction_set(self) -> str: ...
    @property
    def threads(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    def gradients(
        self,
        windows: NDArray[np.integer[Any]],
        *,
        scale: float = 1.0,
        add: bool = False,
        dropout_seed: int = 0,
    ) -> float: ...
    def dropout_masks(self) -> NDArray[np.uint8]: ...
    def loss(self, windows: NDArray[np.integer[Any]]) -> float: ...
    def gradient_norm(self) -> float: ...
    def adamw(
        self,
        moments: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        count: int,
        grad_scale: float = 1.0,
    ) -> None: ...
    def muon(
        self,
        momenta: dict[str, tuple[NDArray[np.float32], int]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        grad_scale: float = 1.0,
    ) -> None: ...

class Engine:
    def __init__(self, path: str, threads: int = 0, *, verify: bool = True) -> None: ...
    @staticmethod
    def from_tensors(
        config: dict[str, Any],
        tensors: dict[str, Any],
        *,
        dtypes: Mapping[str, str] = ...,
        threads: int = 0,
        tokenizer_json: str = "",
        calibration_temperature: float | None = None,
    ) -> Engine: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def threads(self) -> int: ...
    @property
    def instruction_set(self) -> str: ...
    @property
    def quantization(self) -> str: ...
    @property
    def calibration_temperature(self) -> float | None: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def tokenizer_json(self) -> str: ...
    @property
    def length(self) -> int: ...
    def reset(self) -> None: ...
    def logits(self, tokens: _Ids) -> NDArray[np.float32]: ...
    def prefill(self, tokens: _Ids) -> NDArray[np.float32]: ...
    def decode(self, token: int) -> NDArray[np.float32]: ...
    def stream(
        self,
        tokens: _Ids,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int,
        row: int = 0,
        eos: int | None = None,
        probabilities: bool = False,
        reward: Reward | NDArray[np.float64] | None = None,
        beta: float = 1.0,
        reward_top_k: int | None = None,
        details: bool = False,
    ) -> TokenStream: ...
    def generate(
        self,
        tokens: _Ids,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int,
        row: int = 0,
        eos: int | None = None,
        probabilities: bool = False,
        reward: Reward | NDArray[np.float64] | None = None,
        beta: float = 1.0,
        reward_top_k: int | None = None,
    ) -> tuple[list[int], list[float]]: ...

class Utf8Stream:
    def __init__(self) -> None: ...
    def feed(self, raw: bytes) -> str: ...
    def flush(self) -> str: ...

class StopText:
    def __init__(self, stops: Sequence[str]) -> None: ...
    def feed(self, text: str) -> str: ...
    def flush(self) -> str: ...
    @property
    def found(self) -> bool: ...

class Reward:
    def candidates(self) -> NDArray[np.float64]: ...
    def advance(self, id: int) -> None: ...
    def copy(self) -> Reward: ...
    @property
    def vocab_size(self) -> int: ...

class TokenReward(Reward):
    def __init__(self, values: Sequence[float] | NDArray[np.float64]) -> None: ...

class CharReward(Reward):
    def __init__(self, tokenizer: Tokenizer, characters: str) -> None: ...

class TermReward(Reward):
    def __init__(self, tokenizer: Tokenizer, terms: Sequence[str]) -> None: ...

class SumReward(Reward):
    def __init__(self, parts: Sequence[tuple[Reward, float]]) -> None: ...

class Sampler:
    def __init__(
        self,
        vocab_size: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        row: int = 0,
        stream: int = 0,
    ) -> None: ...
    def see(self, tokens: _Ids) -> None: ...
    def next(
        self,
        logits: NDArray[np.float32],
        position: int,
        tilt: NDArray[np.float64] | None = None,
    ) -> int: ...

def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def gumbel(seed: int, id: int, position: int, row: int, stream: int) -> float: ...
def window_start(length: int, block_size: int) -> int: ...
def softmax_moments(
    z: NDArray[np.float64], betas: NDArray[np.float64], *, threads: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]: ...
def usable_cpus() -> int: ...
def instruction_set() -> str: ...
