"""Write text from a trained model: `python -m nanogpt.sample --model gpt.pth --prompt "Once"`."""

if __name__ == "__main__":
    # Before torch is imported, so that --help is quick; the module then runs under its own name.
    import sys

    from nanogpt.cli import main

    sys.exit(main(["sample", *sys.argv[1:]]))

import dataclasses
import json
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanogpt import checkpoint, confidence, machine, native
from nanogpt.confidence import Calibration
from nanogpt.config import SampleConfig
from nanogpt.decoding import Filters, StopText, stream
from nanogpt.errors import InputError, UsageError
from nanogpt.kernels.choice import refuse_shape
from nanogpt.model import GPT
from nanogpt.reward_decoding import (
    RewardedGeneration,
    generate_reward_augmented,
    stream_reward_augmented,
)
from nanogpt.rewards import (
    CombinedReward,
    Reward,
    UnwritableError,
    char_reward_fn,
    term_reward_fn,
)
from nanogpt.terms import read_terms
from nanogpt.tokenizer import RecordTokenizer, StreamDecoder, Tokenizer, tokenizer_from_dict

if TYPE_CHECKING:
    from nanogpt import _C
    from nanogpt._C import Engine


@dataclass(frozen=True)
class Drawn:
    """One new token: its id, the model's probability of it and, of a reward, what it came to.

    Attributes:
        probability: at the calibration temperature; None unless it is needed.
        reward: of this token, before beta.
        log_z, kl: of this step's tilt, in nats.
    """

    token: int
    probability: float | None = None
    reward: float | None = None
    log_z: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Piece:
    """Text that is certain to stay, the least probability of its tokens, and whether one is low."""

    text: str
    probability: float
    low: bool


@dataclass(frozen=True)
class Writer:
    """A model, in torch or in the native engine, with the settings of one command."""

    model: "GPT | Engine"
    tokenizer: Tokenizer
    config: SampleConfig
    seed: int
    calibration: Calibration
    reward: "Reward | _C.Reward | None" = None

    @property
    def needs_probabilities(self) -> bool:
        return self.config.json or self.config.confidence or self.config.min_confidence is not None

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one starts a new document.

        Raises: InputError for a character that the vocabulary lacks.
        """
        return self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text_id]

    def write(self, ids: list[int], row: int) -> "Text":
        """A text that continues `ids`, made while it is iterated over."""
        return Text(self, ids, row)

    def draw(self, ids: list[int], row: int) -> Iterator[Drawn]:
        """One new token after another."""
        config = self.config
        filters = Filters(
            config.temperature,
            config.top_k,
            config.top_p,
            config.min_p,
            config.repetition_penalty,
        )
        if not isinstance(self.model, GPT):
            return self._draw_natively(self.model, ids, row, filters)
        tokens = torch.tensor([ids], device=self.model.token_weight.device)
        if self.reward is None:
            return self._draw_in_torch(self.model, tokens, row, filters)
        return self._draw_with_reward(self.model, tokens, row, filters)

    def carry_particles(self, ids: list[int], row: int) -> tuple[list[Drawn], float]:
        """A text drawn from many that are carried along, and the estimate of log Z."""
        config, tokenizer = self.config, self.tokenizer
        assert isinstance(self.model, GPT)
        ends = None if config.ignore_eos else tokenizer.end_of_text_id
        made = generate_reward_augmented(
            self.model,
            torch.tensor([ids], device=self.model.token_weight.device),
            config.max_new_tokens,
            self.reward,
            _beta(config),
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            min_p=config.min_p,
            repetition_penalty=config.repetition_penalty,
            stop=config.stop,
            eos_token_id=ends,
            seed=self.seed,
            first_row=row,
            reward_top_k=config.reward_top_k,
            num_particles=config.num_particles,
            return_details=True,
        )
        assert isinstance(made, RewardedGeneration)
        columns = (
            made.sequences[0, len(ids) :],
            made.token_probabilities[0],
            made.rewards[0],
            made.log_normalisers[0],
            made.kl[0],
        )
        steps = zip(*(column.tolist() for column in columns), strict=True)
        return [Drawn(*step) for step in steps][: int(made.lengths)], float(made.log_z)

    def _draw_natively(
        self, engine: "Engine", ids: list[int], row: int, filters: Filters
    ) -> Iterator[Drawn]:
        options: dict[str, Any] = {}
        if self.reward is not None:
            options = {
                "reward": self.reward,
                "beta": _beta(self.config),
                "reward_top_k": self.config.reward_top_k,
                "details": self.config.json,
            }
        steps = engine.stream(
            ids,
            self.config.max_new_tokens,
            **vars(filters),
            seed=self.seed,
            row=row,
            probabilities=self.needs_probabilities,
            **options,
        )
        for token, probability in steps:
            yield Drawn(token, probability, *(steps.details or ()))

    def _draw_in_torch(
        self, model: GPT, tokens: torch.Tensor, row: int, filters: Filters
    ) -> Iterator[Drawn]:
        for step in stream(
            model,
            tokens,
            self.config.max_new_tokens,
            filters=filters,
            seed=self.seed,
            first_row=row,
            probabilities=self.needs_probabilities,
        ):
            probability = None if step.probabilities is None else float(step.probabilities)
            yield Drawn(int(step.tokens), probability)

    def _draw_with_reward(
        self, model: GPT, tokens: torch.Tensor, row: int, filters: Filters
    ) -> Iterator[Drawn]:
        for step in stream_reward_augmented(
            model,
            tokens,
            self.config.max_new_tokens,
            self.reward,
            _beta(self.config),
            filters=filters,
            seed=self.seed,
            first_row=row,
            reward_top_k=self.config.reward_top_k,
            probabilities=self.needs_probabilities,
            details=self.config.json,
        ):
            known = (step.probabilities, step.rewards, step.log_z, step.kl)
            yield Drawn(int(step.tokens), *(None if x is None else float(x) for x in known))


class Text:
    """One text: an iterator over its pieces, and what is known of it so far.

    Its pieces never end inside a UTF-8 character and leave out a stop text.

    Attributes:
        drawn: the new tokens.
        low: indices of those below --min-confidence, which are marked.
        refused: the token below it that ended the text, which is none of `drawn`.
        ending: the end-of-text token that ended it, which is none of `drawn` either; its reward
            counts.
        log_z: of a text of particles, the estimate for the whole reward; else None.
    """

    def __init__(self, writer: Writer, ids: list[int], row: int) -> None:
        self.drawn: list[Drawn] = []
        self.low: list[int] = []
        self.refused: Drawn | None = None
        self.ending: Drawn | None = None
        self.log_z: float | None = None
        self._writer = writer
        self._steps: Iterable[Drawn]
        if writer.config.num_particles > 1:
            self._steps, self.log_z = writer.carry_particles(ids, row)
        else:
            self._steps = writer.draw(ids, row)
        # What has been written but may still belong to a stop text: (text, probability, low).
        self._held: deque[Piece] = deque()

    def __iter__(self) -> Iterator[Piece]:
        writer, config = self._writer, self._writer.config
        decoder, watch = StreamDecoder(writer.tokenizer), StopText(config.stop)
        least = config.min_confidence or 0.0
        unlikeliest, low = 1.0, False  # of the tokens since the last whole character
        for step in self._steps:
            if step.token == writer.tokenizer.end_of_text_id and not config.ignore_eos:
                self.ending = step
                break
            probability = 1.0 if step.probability is None else step.probability
            if probability < least and config.low_confidence != "mark":
                self.refused = step
                break
            if probability < least:
                self.low.append(len(self.drawn))
                low = True
            self.drawn.append(step)
            unlikeliest = min(unlikeliest, probability)
            text = decoder.feed(step.token)
            if text:
                self._held.append(Piece(text, unlikeliest, low))
                unlikeliest, low = 1.0, False
            yield from self._certain(watch.feed(text))
            if watch.found:
                return
        text = decoder.flush()
        if text:
            self._held.append(Piece(text, unlikeliest, low))
        yield from self._certain(watch.feed(text) + watch.flush())

    def _certain(self, text: str) -> Iterator[Piece]:
        """The pieces that make up `text`, with which everything held begins."""
        left = len(text)
        while left > 0:
            piece = self._held.popleft()
            if len(piece.text) > left:
                self._held.appendleft(dataclasses.replace(piece, text=piece.text[left:]))
                piece = dataclasses.replace(piece, text=piece.text[:left])
            left -= len(piece.text)
            yield piece


def run(config: SampleConfig) -> int:
    """Load, read the prompt, write. Returns the exit code."""
    device = machine.resolve_device(config.device)
    machine.check_kernels(config.kernels, device)
    machine.set_threads(config.threads)
    _check_together(config)
    model, tokenizer, calibration = _load(config, device)
    seed = int(torch.seed() % 2**62) if config.seed is None else config.seed
    reward = _reward(config, model, tokenizer)
    writer = Writer(model, tokenizer, config, seed, calibration, reward)
    if config.chat:
        return _chat(writer)
    prompt = _read_prompt(config)
    ids = writer.encode(prompt)
    return _print_json(writer, ids) if config.json else _print_text(writer, ids, prompt)


def _check_together(config: SampleConfig) -> None:
    """Raises: UsageError for flags that do not go together."""
    if config.prompt is not None and config.file is not None:
        raise UsageError("--prompt and --file exclude each other")
    if config.chat and config.json:
        raise UsageError("--chat and --json exclude each other")
    for flag, text, what in (
        ("--reward-chars", config.reward_chars, "character"),
        ("--reward-terms", config.reward_terms, "term"),
    ):
        if text == "":
            raise UsageError(f"{flag} needs at least one {what}")
    if config.reward_chars is None and config.reward_terms is None:
        of_rewards = {
            "--beta multiplies a reward": config.beta is not None,
            "--reward-top-k belongs to a reward": config.reward_top_k is not None,
            "--num-particles belongs to a reward": config.num_particles != 1,
        }
        for words, given in of_rewards.items():
            if given:
                raise UsageError(f"{words}: give --reward-chars or --reward-terms too")
    if config.num_particles > 1 and config.temperature == 0:
        raise UsageError("--num-particles draws texts, so --temperature must be above 0")
    if config.num_particles > 1 and config.chat:
        raise UsageError("--num-particles writes a text at its end, so it is not for --chat")
    if config.low_confidence is not None and config.min_confidence is None:
        raise UsageError("--low-confidence belongs to --min-confidence: give that too")


def _load(
    config: SampleConfig, device: torch.device
) -> "tuple[GPT | Engine, Tokenizer, Calibration]":
    """What computes, by --engine, the tokenizer and what is known of the calibration.

    `auto` is the native engine on a CPU where it is built. An exported model.pt is read by that
    engine alone.
    """
    exported = Path(config.model).suffix == native.EXPORT_SUFFIX
    reason = _why_not_native(config, device, exported)
    if exported:
        if reason is not None:
            raise UsageError(f"{config.model} is an export, for the native engine: {reason}")
        engine = native.open_file(config.model, config.threads or 0)
        tokenizer = _tokenizer_of(engine, config.model)
        return engine, tokenizer, Calibration(engine.calibration_temperature)
    if reason is not None and config.engine == "native":
        raise UsageError(f"--engine native: {reason}")
    model, tokenizer = _read_model(config.model, "cpu" if reason is None else device)
    calibration = Calibration(model.calibration_temperature, model.calibration_is_stale)
    if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
        raise InputError(f"{config.model} holds weights that are not finite, so it cannot write")
    if reason is None:
        return native.engine_for(model, config.threads or 0), tokenizer, calibration
    if config.kernels == "triton":
        shape = model.config
        width = shape.n_embd // shape.n_head
        try:
            refuse_shape(device, shape.n_head, width, model.token_weight.dtype)
        except RuntimeError as error:
            raise UsageError(f"--kernels triton: {error}; use auto") from None
    return model.set_kernels(config.kernels), tokenizer, calibration


def _read_model(path: str, device: torch.device | str) -> tuple[GPT, Tokenizer]:
    """A model file of train. Raises: InputError where it cannot write text."""
    if Path(path).is_file() and Path(path).suffix not in checkpoint.SUFFIXES:
        endings = (*checkpoint.SUFFIXES, f"of an export, {native.EXPORT_SUFFIX}")
        raise InputError(
            f"{path} is not known to be a model file: its name ends in {', '.join(endings[:-1])} "
            f"or, {endings[-1]}"
        )
    model, tokenizer = checkpoint.load(path, device)
    if tokenizer is None:
        raise InputError(f"{path} holds no tokenizer, so it cannot write text")
    return model, tokenizer


def _why_not_native(config: SampleConfig, device: torch.device, exported: bool) -> str | None:
    """Why the native engine is not what computes, or None where it is."""
    if config.engine == "torch":
        return "--engine torch was asked for"
    if config.num_particles > 1:
        return f"--num-particles {config.num_particles} is for --engine torch"
    if config.kernels != "auto":
        return f"--kernels {config.kernels} is for --engine torch"
    faster = config.device == "auto" and config.engine == "auto" and not exported
    if device.type != "cpu" and (config.device != "auto" or faster):
        return f"it computes on the CPU, not on {device}"
    return native.why_not() or None


def _tokenizer_of(engine: "Engine", path: str) -> Tokenizer:
    if not engine.tokenizer_json:
        raise InputError(f"{path} holds no tokenizer, so it cannot write text")
    try:
        tokenizer = tokenizer_from_dict(json.loads(engine.tokenizer_json))
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from None
    checkpoint.check_vocabulary(path, tokenizer, engine.config["vocab_size"])
    return tokenizer


def _read_prompt(config: SampleConfig) -> str:
    if config.file is None:
        return config.prompt or ""
    try:
        raw = sys.stdin.buffer.read() if config.file == "-" else Path(config.file).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the prompt {config.file}: {error.strerror}") from None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{config.file} is not UTF-8 text: bad byte at {error.start}") from None


def _beta(config: SampleConfig) -> float:
    return 1.0 if config.beta is None else config.beta


def _reward(
    config: SampleConfig, model: "GPT | Engine", tokenizer: Tokenizer
) -> "Reward | _C.Reward | None":
    """The sum of the rewards that were asked for, for the engine that writes.

    Raises: InputError for what the vocabulary cannot write.
    """
    characters, terms = config.reward_chars, None
    asked = characters is not None or config.reward_terms is not None
    if asked and isinstance(tokenizer, RecordTokenizer):
        raise InputError(
            f"{config.model} was made by explore, whose whole values are single tokens: rewards "
            f"are for models of text"
        )
    if config.reward_terms is not None:
        terms = read_terms(config.reward_terms, "--reward-terms")
    if not isinstance(model, GPT):
        parts = []
        if characters is not None:
            parts.append((native.char_reward(characters, tokenizer), 1.0))
        if terms is not None:
            parts.append((native.term_reward(terms, tokenizer), 1.0))
        return native.sum_reward(parts) if parts else None
    rewards: list[tuple[Reward, float]] = []
    if characters is not None:
        try:
            rewards.append((char_reward_fn(characters, tokenizer), 1.0))
        except UnwritableError as error:  # in the words of the compiled engine
            raise InputError(
                f"no token of the model's vocabulary ends with the character '{error.what}', so "
                f"it cannot be rewarded"
            ) from None
    if terms is not None:
        try:
            rewards.append((term_reward_fn(terms, tokenizer), 1.0))
        except UnwritableError as error:
            raise InputError(
                f"the term '{error.what}' cannot be written with the model's vocabulary, so it "
                f"cannot be rewarded"
            ) from None
    return CombinedReward(rewards) if rewards else None


def _print_text(writer: Writer, ids: list[int], prompt: str) -> int:
    count = writer.config.num_samples
    for row in range(count):
        if count > 1:
            print(f"--- {row + 1} of {count} ---")
        sys.stdout.write(prompt)
        text = writer.write(ids, row)
        for piece in text:
            _show(writer, piece)
        print(flush=True)
        _report(writer, text)
    return 0


def _show(writer: Writer, piece: Piece) -> None:
    """A piece on standard output, at once."""
    text = f"⟦{piece.text}⟧" if piece.low else piece.text
    if writer.config.confidence and confidence.colours_wanted(sys.stdout):
        text = confidence.coloured(text, piece.probability)
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(writer: Writer, text: Text) -> None:
    """What --confidence and --min-confidence have to say of a text, on standard error."""
    config, tokenizer = writer.config, writer.tokenizer
    probabilities = [step.probability or 0.0 for step in text.drawn]
    if config.confidence:
        if config.json or not confidence.colours_wanted(sys.stdout):
            pieces = [tokenizer.token_bytes[step.token] or None for step in text.drawn]
            rows = list(zip(pieces, probabilities, strict=True))
            print(confidence.table(rows), file=sys.stderr)
        print(confidence.summary(probabilities, writer.calibration), file=sys.stderr)
    if text.refused is not None and not config.json:
        print(
            f"ended before a token of probability {text.refused.probability:.4g}, below "
            f"--min-confidence {config.min_confidence:g}",
            file=sys.stderr,
        )


def _print_json(writer: Writer, ids: list[int]) -> int:
    samples = []
    for row in range(writer.config.num_samples):
        text = writer.write(ids, row)
        written = "".join(piece.text for piece in text)
        samples.append({"text": written, **_as_json(writer, text)})
        _report(writer, text)
    result: dict[str, Any] = {
        "samples": samples,
        "seed": writer.seed,
        "prompt_tokens": len(ids),
    }
    if writer.config.confidence:
        result["calibration_temperature"] = writer.calibration.temperature
        result["calibration_stale"] = writer.calibration.stale
    print(json.dumps(result))
    return 0


def _as_json(writer: Writer, text: Text) -> dict[str, Any]:
    """What is known of a text beside its letters."""
    config, drawn = writer.config, text.drawn
    known: dict[str, Any] = {
        "tokens": [step.token for step in drawn],
        "token_probs": [step.probability for step in drawn],
    }
    if writer.reward is not None:
        taken = drawn if text.ending is None else [*drawn, text.ending]
        sums = {
            "reward": sum(step.reward or 0.0 for step in taken),
            "kl": sum(step.kl or 0.0 for step in taken),
            "log_z": sum(step.log_z or 0.0 for step in taken),
        }
        if text.log_z is not None:
            sums["log_z"] = text.log_z
        known |= {name: v if math.isfinite(v) else None for name, v in sums.items()}
    if config.confidence:
        mean = confidence.mean_log([step.probability or 0.0 for step in drawn]) if drawn else None
        known["mean_log_prob"] = mean if mean is not None and math.isfinite(mean) else None
    if config.min_confidence is not None:
        known["low_confidence"] = text.low
        known["refused_prob"] = None if text.refused is None else text.refused.probability
    return known


def _chat(writer: Writer) -> int:
    """Answer line by line. The history is one growing text, as the model knows no turns.

    Without --stop an answer ends at an empty line. Ctrl-C ends an answer, Ctrl-D the chat.
    """
    if not writer.config.stop:
        writer = dataclasses.replace(
            writer, config=dataclasses.replace(writer.config, stop=("\n\n",))
        )
    prompted = sys.stdin.isatty()
    if prompted:
        print("Ctrl-C ends an answer, /reset forgets, /exit or Ctrl-D leaves.", file=sys.stderr)
    history, turn = "", 0
    while True:
        try:
            line = input("> " if prompted else "")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            history = ""
            continue
        text = None
        try:
            ids = writer.encode(history + line + "\n")
            history += line + "\n"
            text = writer.write(ids, turn)
            for piece in text:
                history += piece.text
                _show(writer, piece)
        except InputError as error:
            print(f"{error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print("\n(interrupted)", file=sys.stderr)
        print(flush=True)
        if text is not None:
            _report(writer, text)
        history += "" if history.endswith("\n") else "\n"
        turn += 1
