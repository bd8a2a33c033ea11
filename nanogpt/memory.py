"""How much memory a training run will take: arithmetic over its shape, before anything is built.

A step is walked through in the order in which torch carries it out; what each operation keeps for
its backward pass and what it makes on the way is added up, and the largest sum counts.

N = B·T tokens of a micro-batch, C width, H heads, V vocabulary, P parameters, L layers; products
have `product` bytes a number and the residual stream four. A block keeps for its backward pass

    two norms       input NC and output NC each, mean and reciprocal deviation 2 N
    attention       q, k, v 3 NC, output NC, log-sum-exp NH
    feed-forward    hidden layer 4 NC before GELU and (in torch) 4 NC after it
    dropout         two masks NC: of four bytes on a CPU, of one elsewhere

The native engine lays its workspace out once (csrc/engine/training.cpp): for each layer the stream
twice, 2 NC, and in the precision of products the outputs of two norms 2 NC, q, k, v 3 NC, heads NC
and the hidden layer 8 NC; gradients stay, and so does the smaller workspace of evaluations.

With recomputation it keeps its two inputs, 2 NC, and makes the rest once more in backward.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nanogpt.config import GPTConfig

_FLOAT = 4
_EVALUATION_TOKENS = {"cpu": 4_096}
_EVALUATION_TOKENS_ELSEWHERE = 16_384
_EVALUATION_LOGITS_BYTES = 2**28
"""What evaluation computes at once: so many tokens, and fewer where their logits take more."""
_HOLES = 1.1
"""What an allocator on a CPU takes for a step's tensors: blocks below 32 MB come from a heap, whose
holes do not fit the next ones (glibc; giving every block back at once would take half the holes
and up to half of the speed)."""
_LATER_BYTES = 28_000_000
"""Code and modules that a process on a CPU loads with its first step, checkpoint and report."""


@dataclass(frozen=True)
class Workload:
    """What decides how much memory a run takes.

    Attributes:
        shape: the model's.
        batch: B, sequences computed at once.
        accumulates: whether a step has several micro-batches, so that gradients are there already.
        product_bytes: of a number in products: 4 in float32, 2 in bfloat16 and float16.
        device: "cpu", "cuda" or "mps".
        kernels: the implementation of each operation; what is not named is torch's.
        recompute: whether blocks are computed once more in backward.
        engine: "torch" or "native".
        threads: of the native engine, each with a scratch.
        muon: whether Muon updates matrices, which takes a scratch too.
    """

    shape: GPTConfig
    batch: int
    accumulates: bool = False
    product_bytes: int = _FLOAT
    device: str = "cpu"
    kernels: Mapping[str, str] | None = None
    recompute: bool = False
    engine: str = "torch"
    threads: int = 1
    muon: bool = False

    def picked(self, operation: str) -> str:
        """The implementation of an operation."""
        return (self.kernels or {}).get(operation, "torch")


@dataclass(frozen=True)
class Forecast:
    """Bytes that a run will take at its peak, on the device it computes on.

    Attributes:
        program: what the process takes before there is a model (on a CPU).
        weights: of the model.
        optimizer: AdamW's moments, two of every weight, and Muon's, one.
        kept: activations that wait for the backward pass.
        step: the largest sum of activations, gradients and what lies between them.
        evaluation: the largest sum in an evaluation, which holds no gradients.
        saving: copies of a checkpoint that is written meanwhile (on a CPU).
    """

    program: int
    weights: int
    optimizer: int
    kept: int
    step: int
    evaluation: int
    saving: int

    @property
    def model(self) -> int:
        """Everything but the program, at the peak."""
        return self.weights + self.optimizer + self.saving + max(self.step, self.evaluation)

    @property
    def total(self) -> int:
        """At the peak."""
        return self.program + self.model


def forecast(work: Workload, program_bytes: int = 0) -> Forecast:
    """The peak memory of a run.

    Args:
        program_bytes: resident bytes of the process so far, on a CPU.
    """
    weights = _FLOAT * work.shape.n_parameters()
    holes = _HOLES if work.device == "cpu" else 1.0
    if work.engine == "native":
        holes = 1.0
        kept = _native_bytes(work, work.batch, with_gradients=True)
        kept += 2 * work.threads * _head_scratch(work)  # of steps and of evaluations
        if work.muon:
            width, p = work.shape.n_embd, work.product_bytes
            kept += work.threads * width * width * (10 * _FLOAT + 9 * p)
        step = kept + weights
        batch = evaluation_batch(work.shape, work.device)
        evaluation = step + _native_bytes(work, batch, with_gradients=False)
    else:
        kept, step = step_bytes(work)
        evaluation = _evaluation(work)
    optimizer = 2 * weights
    if work.muon:  # one of the matrices of the blocks
        optimizer -= _FLOAT * 12 * work.shape.n_layer * work.shape.n_embd**2
    # A checkpoint copies weights and moments, and packs the moments in memory before it writes.
    saving = 0 if work.device != "cpu" else weights + 2 * optimizer
    return Forecast(
        program=program_bytes + (_LATER_BYTES if work.device == "cpu" else 0),
        weights=weights,
        optimizer=optimizer,
        kept=kept,
        step=int(step * holes),
        evaluation=int(evaluation * holes),
        saving=saving,
    )


_NATIVE_PANEL = 32
_NATIVE_LOGITS_BYTES, _NATIVE_LOGITS_ROWS = 2**26, 256


def _head_scratch(work: Workload) -> int:
    """Of one thread of the native engine: attention's, or a packed operand's of products."""
    shape, p = work.shape, work.product_bytes
    width, block = shape.n_embd // shape.n_head, shape.block_size
    queries = min(block, 64)
    columns = -(-width // _NATIVE_PANEL) * _NATIVE_PANEL
    keys = -(-block // _NATIVE_PANEL) * _NATIVE_PANEL
    packed = 2 * keys * width * p + 2 * block * columns * p + 2 * queries * columns * p
    scores = queries * block * (2 * p + 2 * _FLOAT)
    return packed + scores + block * width * (2 * p + 2 * _FLOAT) + 500_000


def _native_bytes(work: Workload, batch: int, with_gradients: bool) -> int:
    """The native engine's room for a pass over `batch` sequences, but for each thread's scratch."""
    shape, p = work.shape, work.product_bytes
    n, c, v = batch * shape.block_size, shape.n_embd, shape.vocab_size

    def packed(depth: int, cols: int) -> int:
        return depth * p * -(-cols // _NATIVE_PANEL) * _NATIVE_PANEL

    layer = n * c * (_FLOAT + 14 * p) + n * (4 + shape.n_head) * _FLOAT
    layers = shape.n_layer if with_gradients and not work.recompute else 1
    inputs = shape.n_layer if with_gradients else 1
    chunk = min(n, max(_NATIVE_LOGITS_ROWS, _NATIVE_LOGITS_BYTES // (_FLOAT * v)))
    weights = max(packed(4 * c, c), packed(c, 4 * c))
    dropped = (2 * shape.n_layer + 1) * n * c if shape.dropout and with_gradients else 0
    total = dropped + layers * layer + inputs * n * c * _FLOAT
    total += n * c * (_FLOAT + p) + chunk * v * _FLOAT + weights + packed(c, v)
    if not with_gradients:
        return total + weights
    total += max(weights, packed(n, 4 * c)) + packed(n, c) + packed(v, c) + chunk * v * p
    return total + n * c * (8 * p + 2 * _FLOAT) + n // 64 * 4 * c * _FLOAT


def largest_batch(work: Workload, limit_bytes: int) -> int | None:
    """The largest B, halved from the one given, whose peak is below a limit; None where 1 is not.

    Args:
        limit_bytes: of everything but the program.
    """
    batch = work.batch
    while forecast(replace(work, batch=batch, accumulates=True)).model > limit_bytes:
        if batch == 1:
            return None
        batch //= 2
    return batch


def evaluation_batch(shape: GPTConfig, device: str) -> int:
    """Windows that an evaluation computes at once."""
    tokens = _EVALUATION_TOKENS.get(device, _EVALUATION_TOKENS_ELSEWHERE)
    tokens = min(tokens, _EVALUATION_LOGITS_BYTES // (_FLOAT * shape.vocab_size))
    return max(1, tokens // shape.block_size)


class _Tally:
    """Bytes that are live, and the most that were."""

    def __init__(self, live: int = 0) -> None:
        self.live = self.peak = live

    def make(self, n_bytes: int) -> None:
        self.live += n_bytes
        self.peak = max(self.peak, self.live)

    def drop(self, n_bytes: int) -> None:
        self.live -= n_bytes


def step_bytes(work: Workload) -> tuple[int, int]:
    """Bytes of tensors kept when the forward pass has ended, and the most at any time."""
    shape, p = work.shape, work.product_bytes
    n, c, v = work.batch * shape.block_size, shape.n_embd, shape.vocab_size
    gradients = _FLOAT * shape.n_parameters()
    head = v * c
    tally = _Tally()
    if work.accumulates:
        tally.make(gradients)
    before = tally.live
    tally.make(n * c * _FLOAT + n * 2 * 8)  # embeddings; tokens and targets of eight bytes
    if shape.dropout:
        tally.make(n * c * _mask_bytes(work))
    if p < _FLOAT:  # autocast's copies of the matrices, which products keep
        tally.make(p * (shape.n_layer * 12 * c * c + head))
    # The first block's norm reads the embeddings, the others' a sum that they make themselves of
    # their two inputs: the sum before it and the branch.
    first, others = _kept_by_block(work) - n * c * _FLOAT, _kept_by_block(work)
    inputs = n * c * (_FLOAT + p)
    for layer in range(shape.n_layer):
        tally.make(others if layer else first)
        if work.recompute:
            tally.drop(others if layer else first)
            tally.make(inputs if layer else 0)
    tally.make(n * c * (_FLOAT + p) + 2 * n * _FLOAT)  # the last norm: its input and its output
    if work.picked("cross_entropy") == "triton":
        tally.make(n * v * p)  # logits, whose gradient is written over them
        tally.make(n * c * p + head * p)
        tally.drop(n * v * p)
        kept = tally.live - before
        tally.make(n * c * p + head * _FLOAT)
        tally.drop(n * c * p + head * p)
    else:
        tally.make(n * v * p)
        if p < _FLOAT:
            tally.make(n * v * _FLOAT)
        tally.make(n * v * _FLOAT)  # log-probabilities, which are kept
        tally.drop(n * v * (p if p == _FLOAT else p + _FLOAT))
        kept = tally.live - before
        tally.make(2 * n * v * _FLOAT)  # the loss's gradient to them, and theirs to the logits
        tally.drop(2 * n * v * _FLOAT)
        if p < _FLOAT:
            tally.make(n * v * p)
            tally.drop(n * v * _FLOAT)
        tally.make(n * c * p + head * _FLOAT)
        tally.drop(n * v * p)
    tally.drop(n * c * p)  # the last norm's output
    tally.make(n * c * _FLOAT)
    tally.drop(n * c * (_FLOAT + p) + 2 * n * _FLOAT)
    for layer in reversed(range(shape.n_layer)):
        if work.recompute:
            tally.make(others if layer else first)
        _backward_of_block(work, tally)
        if work.recompute:
            tally.drop(inputs if layer else 0)
    # The embedding's gradient, and its sum with the tied head's.
    tally.make(head * _FLOAT)
    tally.make(head * _FLOAT)
    return kept, tally.peak


def _mask_bytes(work: Workload) -> int:
    return _FLOAT if work.device == "cpu" else 1


def _parts_of_block(work: Workload) -> dict[str, int]:
    """What a block keeps for its backward pass, by the operation that keeps it."""
    shape, p = work.shape, work.product_bytes
    n, c = work.batch * shape.block_size, shape.n_embd
    norm = n * c * _FLOAT + 2 * n * _FLOAT
    attention = 4 * n * c * p + n * shape.n_head * _FLOAT
    if work.picked("attention") == "reference":
        attention += 2 * n * shape.n_head * shape.block_size * _FLOAT
    return {
        "norm": norm,
        "normal": n * c * p,
        "attention": attention,
        "u": 4 * n * c * p,
        "hidden": 0 if work.picked("ffn") == "triton" else 4 * n * c * p,
        "mask": n * c * _mask_bytes(work) if shape.dropout else 0,
    }


def _kept_by_block(work: Workload) -> int:
    part = _parts_of_block(work)
    twice = part["norm"] + part["normal"] + part["mask"]
    return 2 * twice + part["attention"] + part["u"] + part["hidden"]


def _backward_of_block(work: Workload, tally: _Tally) -> None:
    """Take a block's activations off the tally and leave its weights' gradients on it.

    The gradient to its output is on the tally already, NC of four bytes.
    """
    shape, p = work.shape, work.product_bytes
    n, c = work.batch * shape.block_size, shape.n_embd
    part = _parts_of_block(work)
    new = 0 if work.accumulates else _FLOAT  # gradients that are there are added to

    def product(rows_in: int, rows_out: int, saved: int) -> None:
        """From the gradient (N, rows_out) to (N, rows_in) and that of the weight."""
        weight = rows_in * rows_out
        tally.make(n * rows_in * p)
        tally.make(weight * _FLOAT)
        tally.drop(weight * (_FLOAT - new) + saved)

    def norm() -> None:
        tally.make(n * c * _FLOAT)
        tally.drop(n * c * p + part["norm"])

    masked = n * c * p if part["mask"] else 0
    tally.make(masked)
    tally.drop(part["mask"])
    product(4 * c, c, part["hidden"])
    tally.drop(masked)
    tally.make(4 * n * c * p)  # through GELU
    tally.drop(part["u"] + 4 * n * c * p)
    product(c, 4 * c, part["normal"])
    tally.drop(4 * n * c * p)
    norm()
    tally.drop(n * c * _FLOAT)  # added to the gradient of the residual stream
    tally.make(masked)
    tally.drop(part["mask"])
    product(c, c, 0)
    tally.drop(masked)
    tally.make(3 * n * c * p)  # to q, k and v
    tally.drop(part["attention"] + n * c * p)
    tally.make(3 * n * c * p)  # side by side
    tally.drop(3 * n * c * p)
    tally.make(3 * n * c * p)  # in the order of qkv
    tally.drop(3 * n * c * p)
    product(c, 3 * c, part["normal"])
    tally.drop(3 * n * c * p)
    norm()
    tally.drop(n * c * _FLOAT)


def _evaluation(work: Workload) -> int:
    """The most that an evaluation holds: a feed-forward's hidden layer twice, or the logits."""
    shape, p = work.shape, work.product_bytes
    n = evaluation_batch(shape, work.device) * shape.block_size
    stream = n * shape.n_embd * (3 * _FLOAT + 2 * p)
    inside = 8 * n * shape.n_embd * p
    logits = n * shape.vocab_size * (2 * _FLOAT if p == _FLOAT else p + 2 * _FLOAT)
    return max(stream + inside, n * shape.n_embd * (_FLOAT + p) + logits)
