"""Every default, its unit and its explanation: the configuration of the model and the commands.

Frozen dataclasses and nothing but the standard library, so that `--help` costs no torch. A field
made by `option` carries its help text and its limits; `cli.py` turns it into a flag.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from nanogpt.errors import UsageError

GROUPS = ("options", "questions", "text", "offline data", "self-alignment", "model", "training")
"""Headings of --help that come first, in this order."""


def option(
    default: Any,
    help: str,
    *,
    group: str = "options",
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    auto: str | None = None,
    identity: bool = True,
    since: int = 1,
    metavar: str | None = None,
) -> Any:
    """A field of a command's configuration.

    Args:
        default: the value without the flag.
        help: one phrase with the unit.
        group: the heading it stands under in --help.
        choices: the allowed words.
        minimum, above, below, maximum: inclusive and exclusive limits of a number.
        auto: what None means, shown as the default.
        identity: whether another value makes another run (False: where it runs or reports).
        since: of flags that came later the default makes the same run as none did before.
        metavar: the placeholder in --help.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "group": group,
            "choices": choices,
            "minimum": minimum,
            "above": above,
            "below": below,
            "maximum": maximum,
            "auto": auto,
            "identity": identity,
            "since": since,
            "metavar": metavar,
        },
    )


MOST_ROTARY_POSITIONS = 2**20
"""The longest context with rotary positions: no weight shows whether a file's is meant."""


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT: pre-norm GPT-2 blocks with a tied output head, and learned positions or
    rotary ones.

    Raises: ValueError where a value is of another type or out of bounds, where n_embd is not a
        multiple of n_head, and where rotary heads have an odd width.
    """

    vocab_size: int = 257
    """V: ids run from 0 to vocab_size - 1."""
    block_size: int = 128
    """The context length in tokens."""
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    """C: the model's width; n_head divides it."""
    dropout: float = 0.0
    """Probability of dropping an activation in training."""
    bias: bool = False
    """Whether linear maps and layer norms have biases, as GPT-2's do."""
    rotary: bool = False
    """Whether positions turn queries and keys, instead of being embeddings that are learned."""
    qk_norm: bool = False
    """Whether the queries and keys of every head are divided by their root mean square."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r:.40}")
        number = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not (number and 0 <= self.dropout < 1):
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r:.40}")
        for name in ("bias", "rotary", "qk_norm"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r:.40}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd ({self.n_embd}) is not a multiple of n_head ({self.n_head}): "
                f"every head needs the same whole width"
            )
        head_width = self.n_embd // self.n_head
        if self.rotary and head_width % 2:
            raise ValueError(
                f"rotary positions turn pairs, but the heads' width (n_embd / n_head) is "
                f"{head_width}, which is odd"
            )
        if self.rotary and self.block_size > MOST_ROTARY_POSITIONS:
            raise ValueError(
                f"block_size must be at most {MOST_ROTARY_POSITIONS} with rotary positions, "
                f"not {self.block_size}"
            )

    def n_parameters(self, positions: bool = True) -> int:
        """Trained numbers of the model; the head shares the token embedding's.

        Args:
            positions: count the position embedding too, where there is one (GPT-2's published
                counts do).
        """
        c, per_norm = self.n_embd, self.n_embd * (2 if self.bias else 1)
        linear = 3 * c * c + c * c + 2 * 4 * c * c  # qkv, projection, feed-forward in and out
        biases = 3 * c + c + 4 * c + c if self.bias else 0
        blocks = self.n_layer * (linear + biases + 2 * per_norm)
        learned = self.block_size * c if positions and not self.rotary else 0
        return self.vocab_size * c + learned + blocks + per_norm

    def flops_per_token(self) -> int:
        """Multiply-adds of one training step, forward and backward, times two, for one token.

        6 for every weight in a product (the tied head counts, the embeddings do not) and
        12·L·C·T for attention, the causal half not taken off.
        Source: Chowdhery et al. 2022, PaLM, appendix B (arXiv:2204.02311).
        """
        c = self.n_embd
        weights = self.n_layer * 12 * c * c + self.vocab_size * c
        return 6 * weights + 12 * self.n_layer * c * self.block_size


PRESETS: dict[str, dict[str, int | bool]] = {
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 128},
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256},
    "base": {"n_layer": 8, "n_head": 8, "n_embd": 512, "block_size": 512},
    "gpt2": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "bias": True},
}
"""Named shapes: 0.8, 10.7, 25.4 and 124 million parameters with their usual vocabularies."""

SHAPE_FLAGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "rotary", "qk_norm")
"""Flags that stand for a preset's field of the same name."""

DEVICE_HELP = "where to compute: auto, cpu, cuda, cuda:N, mps"
KERNEL_CHOICES = ("auto", "triton", "torch", "reference")


@dataclass(frozen=True)
class VocabularyFlags:
    """How a text becomes tokens."""

    tokenizer: str | None = option(
        None,
        "characters, bytes or byte-pair encoding",
        group="text",
        choices=("char", "byte", "bpe"),
        auto="char, or that of --init",
    )
    vocab_size: int | None = option(
        None,
        "ids of a bpe tokenizer, the special token included",
        group="text",
        minimum=257,
        maximum=1_000_000,
        auto="4096",
    )


@dataclass(frozen=True)
class ShapeFlags:
    """The shape of a model that is trained."""

    preset: str = option("tiny", "a named shape", group="model", choices=tuple(PRESETS))
    n_layer: int | None = option(
        None, "transformer blocks", group="model", minimum=1, auto="the preset's"
    )
    n_head: int | None = option(
        None, "attention heads; n_embd is a multiple", group="model", minimum=1, auto="the preset's"
    )
    n_embd: int | None = option(None, "model width", group="model", minimum=1, auto="the preset's")
    block_size: int | None = option(
        None, "context length in tokens", group="model", minimum=1, auto="the preset's"
    )
    dropout: float = option(
        0.0, "probability of dropping an activation", group="model", minimum=0, below=1
    )
    bias: bool | None = option(
        None, "biases in linear maps and layer norms", group="model", auto="the preset's"
    )
    rotary: bool | None = option(
        None,
        "positions turn queries and keys, instead of being embeddings that are learned",
        group="model",
        auto="the preset's",
        since=2,
    )
    qk_norm: bool | None = option(
        None,
        "queries and keys of every head are divided by their root mean square",
        group="model",
        auto="the preset's",
        since=2,
    )
    init: str | None = option(
        None,
        "start from this model file: its weights, shape and tokenizer",
        group="model",
        auto="new weights",
        metavar="MODEL",
    )


@dataclass(frozen=True)
class OptimizerFlags:
    """AdamW's settings."""

    weight_decay: float = option(0.1, "on matrices only", group="training", minimum=0)
    beta1: float = option(0.9, "AdamW's first moment decay", group="training", minimum=0, below=1)
    beta2: float = option(0.99, "AdamW's second moment decay", group="training", minimum=0, below=1)
    warmup_steps: int | None = option(
        None,
        "steps of linear warmup",
        group="training",
        minimum=0,
        auto="a twentieth of the steps, 100 at most",
    )
    grad_clip: float = option(
        1.0, "largest gradient norm; 0 does not clip", group="training", minimum=0
    )
    seed: int = option(
        1337, "of weights, batches, dropout and samples", group="training", minimum=0, below=2**63
    )


@dataclass(frozen=True)
class RunFlags:
    """Where a run keeps its state."""

    run_dir: str | None = option(
        None,
        "checkpoints, metrics and report",
        group="files",
        auto="runs/<name from configuration and data>",
        identity=False,
        metavar="PATH",
    )
    resume: str = option(
        "auto",
        "go on with an interrupted run: auto, never, or the path of a run directory",
        group="files",
        identity=False,
        metavar="auto|never|PATH",
    )


@dataclass(frozen=True)
class MachineFlags:
    """Where and in which precision a run computes."""

    device: str = option("auto", DEVICE_HELP, group="machine")
    dtype: str = option(
        "auto",
        "precision of the products",
        group="machine",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    kernels: str = option(
        "auto", "implementation of the fused operations", group="machine", choices=KERNEL_CHOICES
    )
    threads: int | None = option(
        None, "CPU threads", group="machine", minimum=1, auto="one per core", identity=False
    )
    recompute: bool = option(
        False,
        "keep less for the backward pass and compute it once more there: less memory, the same "
        "losses, a quarter to two fifths more time",
        group="machine",
        identity=False,
    )
    json: bool = option(
        False, "print one JSON object with the outcome", group="reports", identity=False
    )


@dataclass(frozen=True)
class TrainConfig(MachineFlags, RunFlags, OptimizerFlags, ShapeFlags, VocabularyFlags):
    """Train a GPT on text and write it to one file."""

    text: tuple[str, ...] = option(
        (),
        "files, folders, globs, .gz or - for standard input",
        group="text",
        auto="the Python language reference that comes with Python",
        metavar="PATH",
    )
    encoding_errors: str = option(
        "strict",
        "what to do with bytes that are not UTF-8",
        group="text",
        choices=("strict", "replace"),
    )
    val_fraction: float = option(
        0.1, "the last part of the text, held out for validation", group="text", minimum=0, below=1
    )

    epochs: int | None = option(
        None,
        "passes over the text",
        group="training",
        minimum=1,
        auto="1, or no limit where --max-steps is given; with --recipe speed 250 steps",
    )
    max_steps: int | None = option(
        None, "optimizer steps at most", group="training", minimum=1, auto="no limit"
    )
    batch_size: int | None = option(
        None,
        "sequences in an optimizer step",
        group="training",
        minimum=1,
        auto="64; with --recipe speed as many as make 768 tokens",
    )
    micro_batch_size: int | None = option(
        None,
        "sequences computed at once; gradients accumulate to --batch-size",
        group="training",
        minimum=1,
        auto="as many as fit 65,536 tokens",
    )
    recipe: str = option(
        "standard",
        "optimizer, schedule and defaults; speed: Muon, rotary positions, normalised queries and "
        "keys, a good model in the fewest seconds",
        group="training",
        choices=("standard", "speed"),
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate",
        group="training",
        above=0,
        auto="by the model's width: 4e-3 at 128, 1.6e-3 at 384, 6e-4 at 768; with --recipe speed "
        "half as much again, for what is not Muon's",
    )
    min_lr: float | None = option(
        None,
        "learning rate at the end",
        group="training",
        minimum=0,
        auto="a tenth of the peak; 0 with --recipe speed",
    )
    compile: bool = option(False, "use torch.compile", group="machine")

    eval_interval: int | None = option(
        None,
        "steps between evaluations, each with a checkpoint",
        group="reports",
        minimum=1,
        auto="a tenth of the steps, all of them with --recipe speed; 1,000 at most",
    )
    sample_tokens: int = option(
        200, "tokens written at each evaluation; 0 writes none", group="reports", minimum=0
    )
    tensorboard: bool = option(
        True, "write TensorBoard files into the run directory", group="reports", identity=False
    )

    output: str = option(
        "gpt.pth",
        "the model file: .pth or .safetensors",
        group="files",
        identity=False,
        metavar="PATH",
    )


@dataclass(frozen=True)
class AdvancedConfig(MachineFlags, RunFlags, OptimizerFlags, ShapeFlags, VocabularyFlags):
    """Train on rewarded texts, or align a model with terms of a domain."""

    offline_data: str | None = option(
        None,
        "rewarded texts: lines text|reward, or .jsonl or .csv with text or prompt and completion, "
        "and reward; - for standard input",
        group="offline data",
        auto="none",
        metavar="PATH",
    )
    objective: str = option(
        "weighted",
        "weighted likelihood, or what needs --init: preferences of pairs (dpo), good and bad (kto)",
        group="offline data",
        choices=("weighted", "dpo", "kto"),
    )
    weighting: str = option(
        "exp",
        "how rewards become weights; identity is plain training",
        group="offline data",
        choices=("exp", "binary", "topk", "rank", "identity"),
    )
    beta: float | None = option(
        None,
        "temperature of the rewards: small is greedy",
        group="offline data",
        above=0,
        auto="1.0; 0.1 in dpo and kto",
    )
    scale_rewards: str = option(
        "std",
        "what rewards are divided by: their standard deviation, that of their prompt, or 1",
        group="offline data",
        choices=("std", "group", "none"),
    )
    target_ess: float | None = option(
        None,
        "find the beta of this effective sample size: records, or below 1 a share of them",
        group="offline data",
        above=0,
        auto="--beta is used",
    )
    target_kl: float | None = option(
        None,
        "find the beta that moves the data by this many nats",
        group="offline data",
        above=0,
        auto="--beta is used",
    )
    max_weight: float = option(
        20.0, "records of average reward that one may count for", group="offline data", minimum=1
    )
    top_fraction: float = option(
        0.25, "best part kept by --weighting topk", group="offline data", above=0, maximum=1
    )
    kl_coef: float = option(
        0.0,
        "price of a nat a token away from the model of --init",
        group="offline data",
        minimum=0,
    )
    val_fraction: float = option(
        0.1, "records held out for validation", group="offline data", minimum=0, below=1
    )
    compare: bool = option(
        False,
        "prove it: train plainly and on the best fifth too, on half of the file, and judge samples "
        "by what the other half likes",
        group="offline data",
    )
    compare_samples: int = option(
        512, "texts written by each model of --compare", group="offline data", minimum=2
    )

    align_terms: str | None = option(
        None,
        "terms to write more of: a,b,c or a file with one a line; needs --init",
        group="self-alignment",
        auto="none",
        metavar="FILE|a,b,c",
    )
    rounds: int = option(3, "times to sample, score and train", group="self-alignment", minimum=1)
    num_generations: int = option(1024, "samples of a round", group="self-alignment", minimum=2)
    max_completion_length: int = option(
        128, "tokens of a sample", group="self-alignment", minimum=1
    )
    anchor_text: str | None = option(
        None,
        "original text that is mixed in and judges general ability",
        group="self-alignment",
        auto="samples of the model",
        metavar="PATH",
    )
    anchor_fraction: float = option(
        0.3, "part of each round that is original text", group="self-alignment", minimum=0, below=1
    )
    distil_beta: float | None = option(
        None,
        "draw with the terms rewarded by this much instead, and learn what is written without "
        "weights: for terms that the model never writes; large is greedy",
        group="self-alignment",
        above=0,
        auto="draw as the model writes",
    )
    kl_budget: float | None = option(
        None,
        "stop before samples are this far from the model of --init, in nats a text",
        group="self-alignment",
        above=0,
        auto="0.05 for each token of a sample",
    )

    epochs: int = option(3, "passes over the records", group="training", minimum=1)
    plain_epochs: int | None = option(
        None,
        "passes before those in which every record counts the same; --compare shares them",
        group="training",
        minimum=0,
        auto="as many as --epochs from scratch, 0 with --init",
    )
    batch_size: int = option(64, "sequences in an optimizer step", group="training", minimum=1)
    learning_rate: float | None = option(
        None,
        "peak learning rate",
        group="training",
        above=0,
        auto="by the model's width as in train; a quarter of that after --init or --plain-epochs, "
        "a fortieth in dpo, kto and --align-terms",
    )
    output: str = option(
        "gpt_aligned.pth",
        "the model file: .pth or .safetensors",
        group="files",
        identity=False,
        metavar="PATH",
    )


@dataclass(frozen=True)
class SampleConfig:
    """Write text from a trained model."""

    model: str = option(
        "gpt.pth", "the model file: .pth, .safetensors, or .pt of export", metavar="PATH"
    )
    prompt: str | None = option(
        None, "text to continue", auto="start a new document", metavar="TEXT"
    )
    file: str | None = option(
        None, "read the prompt from this file, - for standard input", auto="no file", metavar="PATH"
    )
    max_new_tokens: int = option(200, "tokens to write", minimum=0)
    num_samples: int = option(1, "texts to write", minimum=1)
    stop: tuple[str, ...] = option(
        (), "end a text before any of these", auto="no stop", metavar="TEXT"
    )
    ignore_eos: bool = option(True, "write on after the end-of-text token")
    json: bool = option(False, "print one JSON object with texts, tokens and probabilities")
    chat: bool = option(False, "answer line by line and keep the history")

    temperature: float = option(
        1.0, "divides the logits; 0 always takes the likeliest", group="sampling", minimum=0
    )
    top_k: int | None = option(
        None, "keep the k likeliest tokens", group="sampling", minimum=1, auto="all"
    )
    top_p: float | None = option(
        None,
        "keep the likeliest tokens that reach this probability together",
        group="sampling",
        above=0,
        maximum=1,
        auto="all",
    )
    min_p: float | None = option(
        None,
        "keep tokens at least this fraction as likely as the likeliest",
        group="sampling",
        minimum=0,
        maximum=1,
        auto="all",
    )
    repetition_penalty: float = option(
        1.0, "above 1 makes tokens that stand in the text less likely", group="sampling", above=0
    )
    seed: int | None = option(
        None, "same seed, same text", group="sampling", minimum=0, below=2**64, auto="a new one"
    )

    reward_chars: str | None = option(
        None,
        "reward tokens that end in one of these characters",
        group="rewards",
        auto="no reward",
        metavar="CHARS",
    )
    reward_terms: str | None = option(
        None,
        "reward progress through these terms: a,b,c or a file of lines",
        group="rewards",
        auto="no reward",
        metavar="TERMS",
    )
    beta: float | None = option(
        None,
        "multiplies the reward that is added to the log-probabilities",
        group="rewards",
        auto="1.0",
    )
    reward_top_k: int | None = option(
        None,
        "with a reward, draw from so many of the likeliest tokens",
        group="rewards",
        minimum=1,
        auto="all",
    )
    num_particles: int = option(
        1,
        "texts carried along for one whose whole reward counts (sequential Monte Carlo, in torch)",
        group="rewards",
        minimum=1,
        maximum=4096,
    )

    confidence: bool = option(
        False,
        "show how probable the model held each token: in colours on a terminal, else in a table on "
        "standard error",
        group="confidence",
    )
    min_confidence: float | None = option(
        None,
        "the least probability of a token that is written",
        group="confidence",
        above=0,
        maximum=1,
        auto="no limit",
    )
    low_confidence: str | None = option(
        None,
        "at a less probable one, end the text before it, or write it in ⟦ ⟧ and go on",
        group="confidence",
        choices=("stop", "mark"),
        auto="stop",
    )

    engine: str = option(
        "auto",
        "what computes; auto is native on a CPU where it is built",
        group="machine",
        choices=("auto", "torch", "native"),
    )
    device: str = option("auto", DEVICE_HELP, group="machine")
    kernels: str = option(
        "auto", "implementation of the fused operations", group="machine", choices=KERNEL_CHOICES
    )
    threads: int | None = option(
        None, "CPU threads", group="machine", minimum=1, auto="one per core; native measures"
    )


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model for other programs, and check what was written."""

    model: str = option("gpt.pth", "the model file", metavar="PATH")
    output: str | None = option(
        None,
        "what to write: a file; a folder for hf",
        auto="model.pt, model.safetensors, model-hf or model.gguf",
        metavar="PATH",
    )
    format: str = option(
        "torchscript",
        "one file for libtorch and nanogpt-generate; ours; Hugging Face's GPT-2; llama.cpp's",
        choices=("torchscript", "safetensors", "hf", "gguf"),
    )
    quantize: str = option(
        "none",
        "precision of the matrices, in torchscript and gguf",
        choices=("none", "bf16", "int8"),
    )
    verify: bool = option(True, "read the file back and compare before it gets its name")
    json: bool = option(False, "print one JSON object with the outcome")


@dataclass(frozen=True)
class CalibrateConfig:
    """Fit the temperature at which a model's probabilities are right; show how right they are."""

    model: str = option("gpt.pth", "the model file", metavar="PATH")
    text: tuple[str, ...] = option(
        (),
        "files, folders, globs, .gz or -: text that the model has not seen; half of it is fitted "
        "to, half of it judges",
        auto="none: it must be given",
        metavar="PATH",
    )
    encoding_errors: str = option(
        "strict", "what to do with bytes that are not UTF-8", choices=("strict", "replace")
    )
    output: str | None = option(
        None,
        "the model file with its temperature: .pth or .safetensors",
        auto="<model>-calibrated beside the model",
        metavar="PATH",
    )
    report: str | None = option(
        None, "a page with the reliability diagram", auto="none", metavar="FILE.html"
    )
    per_token: bool = option(
        False, "also fit a temperature for each token, kept only where it judges better"
    )
    bins: int = option(15, "bins of the reliability diagram and the ECE", minimum=1, maximum=1000)
    seed: int = option(0, "of the two halves and the intervals", minimum=0, below=2**63)
    batch_size: int | None = option(
        None,
        "windows computed at once",
        group="machine",
        minimum=1,
        auto="as many as make 64 MiB of logits",
    )
    device: str = option("auto", DEVICE_HELP, group="machine")
    threads: int | None = option(
        None, "CPU threads", group="machine", minimum=1, auto="one per core"
    )
    json: bool = option(False, "print one JSON object with the numbers")


@dataclass(frozen=True)
class ExploreConfig(RunFlags):
    """Find out what a table, a log or a text holds, with a model trained on the spot."""

    data: str | None = option(
        None,
        "the records: .csv, .tsv, .jsonl (one object a line) or .txt (one record a line)",
        auto="none: it must be given",
        identity=False,
        metavar="PATH",
    )
    format: str = option(
        "auto",
        "what --data is; auto goes by its name, or by its content",
        choices=("auto", "csv", "tsv", "jsonl", "txt"),
    )
    alpha: float = option(
        0.05,
        "findings hold at this false discovery rate, over everything tried",
        above=0,
        below=1,
        identity=False,
    )
    query: str | None = option(
        None,
        "show the records most like this text, or like the record FIELD=VALUE,…",
        group="questions",
        auto="no question",
        identity=False,
        metavar="TEXT",
    )
    k: int = option(10, "records that --query shows", group="questions", minimum=1, identity=False)
    complete: str | None = option(
        None,
        "show what this field is likely to be where it is missing, or in the record of --given",
        group="questions",
        auto="no question",
        identity=False,
        metavar="FIELD",
    )
    given: str | None = option(
        None,
        'what --complete knows of a record; a comma inside a value: "FIELD=VALUE, VALUE"',
        group="questions",
        auto="the records where the field is missing",
        identity=False,
        metavar="FIELD=VALUE,…",
    )
    impute: str | None = option(
        None,
        "write the records with their missing values filled in",
        group="questions",
        auto="none",
        identity=False,
        metavar="OUT.csv",
    )
    n_layer: int | None = option(
        None, "transformer blocks", group="model", minimum=1, auto="2, or those of --init"
    )
    n_head: int | None = option(
        None,
        "attention heads",
        group="model",
        minimum=1,
        auto="one for 32 of the width, or those of --init",
    )
    n_embd: int | None = option(
        None,
        "model width, a multiple of --n-head",
        group="model",
        minimum=1,
        auto="64; 128 where there is free text; or that of --init",
    )
    init: str | None = option(
        None,
        "start from this model file, written by explore for records with the same fields",
        group="model",
        auto="new weights",
        metavar="MODEL",
    )
    epochs: int = option(
        2,
        "passes of training; each shows every record in eight orders of its fields",
        group="training",
        minimum=1,
    )
    batch_size: int | None = option(
        None,
        "records in an optimizer step",
        group="training",
        minimum=1,
        auto="by the number of records, 16 to 256",
    )
    folds: int | None = option(
        None,
        "parts of the records; each is scored by a model that was trained on the others",
        group="training",
        minimum=2,
        auto="by the number of records",
    )
    seed: int = option(
        0, "same data and seed, same findings", group="training", minimum=0, below=2**63
    )
    output: str = option(
        "gpt_knowledge.pth",
        "the model of all records: .pth or .safetensors",
        group="files",
        identity=False,
        metavar="PATH",
    )
    report: str | None = option(
        None,
        "the page with everything that was found",
        group="files",
        auto="report.html in the run directory",
        identity=False,
        metavar="FILE.html",
    )
    findings: str | None = option(
        None,
        "the same for programs",
        group="files",
        auto="findings.json in the run directory",
        identity=False,
        metavar="FILE.json",
    )
    device: str = option("auto", DEVICE_HELP, group="machine")
    threads: int | None = option(
        None, "CPU threads", group="machine", minimum=1, auto="one per core", identity=False
    )
    json: bool = option(
        False, "print one JSON object with findings and answers", group="machine", identity=False
    )


@dataclass(frozen=True)
class BenchConfig(MachineFlags, ShapeFlags):
    """Say what this machine does, which paths are picked, and how they compare with others."""

    seconds: float = option(60.0, "about how long to measure", minimum=1, maximum=86_400)
    compile: bool = option(
        False, "measure torch.compile of the plain model too, which takes minutes to compile"
    )
    peers: bool = option(True, "measure others beside ours")
    vocab_size: int = option(96, "ids of the vocabulary", group="model", minimum=2, maximum=55_000)
    batch_size: int = option(16, "sequences in an optimizer step", group="training", minimum=1)
    max_new_tokens: int | None = option(
        None,
        "tokens to write",
        group="training",
        minimum=1,
        auto="half of the context, 128 at most",
    )


@dataclass(frozen=True)
class DoctorConfig:
    """Say what is installed, what a missing part would give, and the command that adds it."""

    json: bool = option(False, "print one JSON object")


def shape_from_flags(config: ShapeFlags, vocab_size: int) -> GPTConfig:
    """The model's shape: the preset's, with the flags that were given in its place.

    Raises: UsageError where the sizes do not fit together.
    """
    shape: dict[str, Any] = dict(PRESETS[config.preset])
    for name in SHAPE_FLAGS:
        if getattr(config, name) is not None:
            shape[name] = getattr(config, name)
    try:
        return GPTConfig(vocab_size=vocab_size, dropout=config.dropout, **shape)
    except ValueError as error:
        flags = "--block-size" if str(error).startswith("block_size") else "--n-embd and --n-head"
        raise UsageError(f"{error}: set {flags}") from None


def default_learning_rate(n_embd: int) -> float:
    """Peak learning rate by width: measured best at 128, GPT-2's published 6e-4 at 768."""
    return 6e-4 * (768 / n_embd) ** 1.06 if n_embd < 768 else 6e-4 * math.sqrt(768 / n_embd)


def as_plain_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready values (tuples become lists)."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }
