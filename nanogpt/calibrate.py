"""Calibrate a model: `python -m nanogpt.calibrate --model gpt.pth --text held_out.txt`.

The text is cut into windows of the model's context, as validation is. Of every two neighbours one
is fitted to and one judges, so that the numbers shown are of text that the fit has not seen, and
both halves come from everywhere in it. The logits are made anew for every pass and never kept.
"""

if __name__ == "__main__":
    # Before torch is imported, so that --help is quick; the module then runs under its own name.
    import sys

    from nanogpt.cli import main

    sys.exit(main(["calibrate", *sys.argv[1:]]))

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanogpt import checkpoint, machine, metadata
from nanogpt.calibration import (
    Batch,
    Batches,
    Difference,
    PerTokenTemperature,
    TemperatureScaler,
    TokenStatistics,
    paired_difference,
)
from nanogpt.config import CalibrateConfig
from nanogpt.data import Corpus, gather, prepare, validation_windows
from nanogpt.errors import InputError, UsageError
from nanogpt.interruption import terminable
from nanogpt.model import GPT, evaluating
from nanogpt.report.calibration import CalibrationPage, comparison, render_calibration_report

_LOGIT_BYTES = 64 * 2**20
_BATCH_TOKENS = 16_384
_LEAST_TOKENS = 10


@dataclass(frozen=True)
class Windows:
    """Parts of a token stream, each read from its own beginning.

    Attributes:
        tokens: (n,) the stream.
        starts, lengths: (W,) first input and number of targets of every window.
    """

    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def n_targets(self) -> int:
        return int(self.lengths.sum())

    def targets(self) -> np.ndarray:
        """(n_targets,) the ids that are predicted, window after window."""
        spans = zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        parts = [self.tokens[start + 1 : start + 1 + length] for start, length in spans]
        return np.concatenate([np.empty(0, self.tokens.dtype), *parts])

    def batches(self, model: GPT, batch_size: int | None = None) -> Batches:
        """Logits, targets and window numbers, made anew for every pass.

        Args:
            model: in evaluation mode; its device computes.
            batch_size: windows at once; None for 64 MiB of logits at most, or one window.
        """
        return lambda: self._pass(model, batch_size)

    def _pass(self, model: GPT, batch_size: int | None) -> Iterator[Batch]:
        device = model.token_weight.device
        for length in sorted(set(self.lengths.tolist()), reverse=True):
            (numbers,) = np.nonzero(self.lengths == length)
            fitting = _LOGIT_BYTES // (4 * model.config.vocab_size)
            count = batch_size or max(1, min(_BATCH_TOKENS, fitting) // length)
            for first in range(0, len(numbers), count):
                part = numbers[first : first + count]
                windows = torch.from_numpy(gather(self.tokens, self.starts[part], length))
                windows = windows.to(device)
                groups = torch.from_numpy(part).to(device).repeat_interleave(length)
                yield _logits(model, windows[:, :-1]), windows[:, 1:].reshape(-1), groups


@torch.inference_mode()
def _logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """(B T, V) of the tokens that follow each of `tokens` (B, T)."""
    logits, _ = model(tokens)
    return logits.flatten(0, 1)


def windows_of(tokens: np.ndarray, block_size: int) -> Windows:
    """Consecutive windows that hold every target once; two at least where there are two targets."""
    length = min(block_size, max(1, (len(tokens) - 1) // 2))
    groups = validation_windows(len(tokens), length)
    starts = [np.asarray(starts, dtype=np.int64) for starts, _ in groups]
    lengths = [np.full(len(starts), length, dtype=np.int64) for starts, length in groups]
    none = np.empty(0, dtype=np.int64)
    return Windows(tokens, np.concatenate([none, *starts]), np.concatenate([none, *lengths]))


def split_windows(windows: Windows, seed: int) -> tuple[Windows, Windows]:
    """Two halves: of every two neighbouring windows, a coin puts one into each."""
    count = len(windows.starts)
    coins = np.random.default_rng(seed).integers(0, 2, size=(count + 1) // 2)
    is_first = np.arange(count) % 2 == np.repeat(coins, 2)[:count]
    if count == 1:
        is_first[:] = True
    return tuple(  # type: ignore[return-value]
        Windows(windows.tokens, windows.starts[chosen], windows.lengths[chosen])
        for chosen in (is_first, ~is_first)
    )


def fit_model(
    model: GPT, tokens: np.ndarray, *, batch_size: int | None = None
) -> TemperatureScaler:
    """Fit the temperature of a model to text, teacher-forced, in evaluation mode.

    Args:
        tokens: (n,) ids that the model has not been trained on, n >= 2.
        batch_size: windows at once.
    Returns: the scaler, its standard error by windows. The model is left as it was: set
        `model.calibration_temperature` to use the temperature.
    Raises: ValueError where there is no target.
    """
    with evaluating(model):
        windows = windows_of(tokens, model.config.block_size)
        return TemperatureScaler().fit_batches(windows.batches(model, batch_size))


@dataclass(frozen=True)
class Outcome:
    """What a calibration found.

    Attributes:
        before, after, per_token: statistics at T = 1, at T, and at each token's own T.
        difference: NLL at T minus NLL at 1, by windows.
        per_token_difference: NLL at each token's own T minus NLL at T.
        bytes_per_target: of the text that judges; 0 where its targets stand for no bytes.
    """

    scaler: TemperatureScaler
    head: PerTokenTemperature | None
    before: TokenStatistics
    after: TokenStatistics
    per_token: TokenStatistics | None
    difference: Difference
    per_token_difference: Difference | None
    bytes_per_target: float

    @property
    def keeps_head(self) -> bool:
        return self.per_token_difference is not None and self.per_token_difference.is_worth_it


def run(config: CalibrateConfig) -> int:
    """Check, fit, judge, write. Returns the exit code."""
    say = _quiet if config.json else _say
    if not config.text:
        raise UsageError("calibrate needs --text: text that the model has not seen")
    output = _output_path(config)
    if config.output is not None:
        checkpoint.check_output(output)
    if config.report is not None:
        _check_report(Path(config.report), [config.model, output, *config.text])
    device = machine.resolve_device(config.device)
    machine.set_threads(config.threads)
    with terminable():
        model, tokenizer = checkpoint.load(config.model, device)
        if tokenizer is None:
            raise InputError(f"{config.model} holds no tokenizer, so it cannot read text")
        checkpoint.check_output(output)  # its name may come from the model's
        corpus = prepare(
            config.text,
            tokenizer=tokenizer,
            encoding_errors=config.encoding_errors,
            note=say,
        )
        if corpus.n_tokens < 2:
            raise InputError(f"{corpus.name} is too short: one token leaves nothing to predict")
        notes: list[str] = []
        try:
            outcome = _calibrate(model, corpus, config, say, notes)
        except ValueError as error:
            raise InputError(f"{config.model} cannot be calibrated: {error}") from None
        difference = outcome.difference
        if difference.interval[0] > 0:
            notes.append("on text that it was not fitted to, this temperature is worse than none")
        _adopt(model, outcome)
        content = _as_json(config, output, corpus, outcome, notes)
        page = _page(config, corpus, outcome, content)
        checkpoint.write_output(model, output)
        if config.report is not None:
            _write_page(Path(config.report), render_calibration_report(page))
    if config.json:
        print(json.dumps(content, allow_nan=False))
        return 0
    _print(config, page, output)
    return 0


def _calibrate(
    model: GPT,
    corpus: Corpus,
    config: CalibrateConfig,
    say: Callable[[str], None],
    notes: list[str],
) -> Outcome:
    """Fit on one half of the windows, judge on the other; sentences for the user go to `notes`."""
    windows = windows_of(corpus.tokens, model.config.block_size)
    to_fit, to_judge = split_windows(windows, config.seed)
    if to_fit.n_targets + to_judge.n_targets < _LEAST_TOKENS:
        raise InputError(
            f"{corpus.name} is too short to fit a temperature to: at least {_LEAST_TOKENS} tokens "
            f"are needed, and some thousands for one that is known well"
        )
    say(
        f"text {corpus.name}: {to_fit.n_targets:,} tokens to fit, {to_judge.n_targets:,} to judge; "
        f"the numbers mean something only if the model was not trained on them"
    )
    with evaluating(model):
        fitted = to_fit.batches(model, config.batch_size)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scaler = TemperatureScaler().fit_batches(fitted, note=say)
        notes += [str(warning.message) for warning in caught]
        head = None
        if config.per_token:
            say("fitting a temperature for each token")
            head = PerTokenTemperature(scaler.temperature_).fit_batches(fitted)
        before, after = TokenStatistics(), TokenStatistics(scaler.temperature_)
        per_token = None if head is None else TokenStatistics(head)
        judges = [each for each in (before, after, per_token) if each is not None]
        for batch in to_judge.batches(model, config.batch_size)():
            for each in judges:
                each.add(*batch)
    own = None
    if per_token is not None:
        own = paired_difference(after.nll, per_token.nll, after.groups)
    return Outcome(
        scaler=scaler,
        head=head,
        before=before,
        after=after,
        per_token=per_token,
        difference=paired_difference(before.nll, after.nll, before.groups),
        per_token_difference=own,
        bytes_per_target=corpus.count_bytes(to_judge.targets()) / to_judge.n_targets,
    )


def _adopt(model: GPT, outcome: Outcome) -> None:
    """Give the model its temperature and the record of how it was found."""
    scaler = outcome.scaler
    weights = {name: value for name, value in model.state_dict().items() if name != metadata.KEY}
    model.calibration_temperature = scaler.temperature_
    model.calibration = {
        "temperature": scaler.temperature_,
        "se": _finite(scaler.temperature_se_),
        "n_tokens": scaler.n_tokens_,
        "nll_before": scaler.nll_before_,
        "nll_after": scaler.nll_after_,
        "weights_sha256": metadata.tensor_digest(weights),
    }
    if outcome.keeps_head and outcome.head is not None:
        model.calibration["per_token"] = outcome.head.weights_


def _as_json(
    config: CalibrateConfig, output: Path, corpus: Corpus, outcome: Outcome, notes: list[str]
) -> dict[str, Any]:
    """The outcome of the command, for --json and the report."""
    scaler = outcome.scaler

    def judged(statistics: TokenStatistics) -> dict[str, Any]:
        content = statistics.report(config.bins, seed=config.seed).as_dict()
        bits = _bits_per_nat(outcome)
        return {**content, "bits_per_byte": None if bits is None else content["nll"] * bits}

    content = {
        "output": str(output),
        "report": config.report,
        "text": corpus.name,
        "temperature": scaler.temperature_,
        "temperature_se": _finite(scaler.temperature_se_),
        "bound": scaler.bound_,
        "passes": scaler.passes_,
        "n_tokens_fitted": scaler.n_tokens_,
        "n_tokens_judged": outcome.before.n_tokens,
        "nll_fitted_before": scaler.nll_before_,
        "nll_fitted_after": scaler.nll_after_,
        "nll_difference": _difference(outcome.difference),
        "before": judged(outcome.before),
        "after": judged(outcome.after),
        "per_token": None,
    }
    if outcome.head is not None and outcome.per_token is not None:
        assert outcome.per_token_difference is not None
        content["per_token"] = {
            "weights": outcome.head.weights_,
            "kept": outcome.keeps_head,
            "nll_difference": _difference(outcome.per_token_difference),
            **judged(outcome.per_token),
        }
        change = outcome.per_token_difference
        verdict = "it is kept" if outcome.keeps_head else "it is not kept"
        notes.append(
            f"a temperature for each token changes the NLL by {change.mean:+.5f} ± "
            f"{change.standard_error:.5f} nats a token against the one for all: {verdict}"
        )
    return {**content, "notes": notes}


def _page(
    config: CalibrateConfig, corpus: Corpus, outcome: Outcome, content: dict[str, Any]
) -> CalibrationPage:
    scaler = outcome.scaler
    facts = {
        "model": config.model,
        "text": f"{corpus.name}, {corpus.n_tokens:,} tokens, {corpus.n_bytes:,} bytes",
        "fitted to": f"{scaler.n_tokens_:,} tokens, one window of every two, seed {config.seed}",
        "passes over them": str(scaler.passes_),
        "NLL there, nats a token": f"{scaler.nll_before_:.4f}, now {scaler.nll_after_:.4f}",
        "judged on": f"{outcome.before.n_tokens:,} tokens that the fit has not seen",
    }
    return CalibrationPage(
        title=f"{Path(config.model).name} on {corpus.name}",
        temperature=scaler.temperature_,
        standard_error=_finite(scaler.temperature_se_),
        before=content["before"],
        after=content["after"],
        bits_per_nat=_bits_per_nat(outcome),
        difference=content["nll_difference"],
        notes=content["notes"],
        facts=facts,
    )


def _print(config: CalibrateConfig, page: CalibrationPage, output: Path) -> None:
    """The outcome in the terminal: numbers to standard output, messages to standard error."""
    error = "" if page.standard_error is None else f" ± {page.standard_error:.2g}"
    print(f"temperature {page.temperature:.5g}{error}")
    rows = comparison(page)
    width = max(len(name) for name, _, _ in rows) + 2
    print(f"{'':{width}}{'before':>18}{'after':>18}")
    for name, before, after in rows:
        print(f"{name:{width}}{before:>18}{after:>18}")
    change = f"NLL changed by {page.difference['mean']:+.4f} nats a token"
    if page.difference["interval"] is not None:
        low, high = page.difference["interval"]
        change += f" (95 %: {low:+.4f} … {high:+.4f})"
    print(f"{change}, on {page.after['n_tokens']:,} tokens")
    for note in page.notes:
        _say(f"note: {note}")
    _say(f"wrote {output}: the same weights with their temperature")
    if config.report is not None:
        _say(f"report: {config.report}")


def _bits_per_nat(outcome: Outcome) -> float | None:
    """Bits a byte for one nat a token, or None where the text has no bytes."""
    of_target = outcome.bytes_per_target
    return 1 / math.log(2) / of_target if of_target else None


def _difference(difference: Difference) -> dict[str, Any]:
    known = math.isfinite(difference.standard_error)
    return {
        "mean": difference.mean,
        "standard_error": _finite(difference.standard_error),
        "interval": list(difference.interval) if known else None,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _output_path(config: CalibrateConfig) -> Path:
    if config.output is not None:
        return Path(config.output)
    model = Path(config.model)
    return model.with_name(f"{model.stem}-calibrated{model.suffix}")


def _check_report(path: Path, others: Sequence[str | Path]) -> None:
    """Raises: UsageError where --report could not be written, or is one of the other files."""
    if any(checkpoint.same_place(path, other) for other in others if other != "-"):
        raise UsageError(f"--report {path} is also --model, --text or --output: name another file")
    if path.exists() and not path.is_file():
        raise UsageError(f"--report {path} exists and is not a file")
    checkpoint.check_writable(path, "--report")


def _write_page(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomically(path, lambda file: file.write(page.encode()))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _quiet(message: str) -> None:
    pass
