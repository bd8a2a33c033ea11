"""Write text from a trained model: `python -m nanogpt.sample --model gpt.pth --prompt "Once"`."""

if __name__ == "__main__":
    # Before torch is imported, so that --help is quick; the module then runs under its own name.
    import sys

    from nanogpt.cli import main

    sys.exit(main(["sample", *sys.argv[1:]]))

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nanogpt import checkpoint, machine, native
from nanogpt.config import SampleConfig
from nanogpt.decoding import Filters, StopText, stream
from nanogpt.errors import InputError, UsageError
from nanogpt.kernels.choice import refuse_shape
from nanogpt.model import GPT
from nanogpt.tokenizer import StreamDecoder, Tokenizer, tokenizer_from_dict

if TYPE_CHECKING:
    from nanogpt._C import Engine


@dataclass(frozen=True)
class Writer:
    """A model, in torch or in the native engine, with the settings of one command."""

    model: "GPT | Engine"
    tokenizer: Tokenizer
    config: SampleConfig
    seed: int

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one starts a new document.

        Raises: InputError for a character that the vocabulary lacks.
        """
        return self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text_id]

    def write(self, ids: list[int], row: int) -> Iterator[tuple[str, int, float | None]]:
        """Yield (text that is complete, token id, its probability) for one new token after another.

        The text never ends inside a UTF-8 character and leaves out a stop text. The last item may
        carry what was held back, with the id -1.
        """
        config = self.config
        decoder, watch = StreamDecoder(self.tokenizer), StopText(config.stop)
        for token, probability in self._steps(ids, row):
            if token == self.tokenizer.end_of_text_id and not config.ignore_eos:
                break
            yield watch.feed(decoder.feed(token)), token, probability
            if watch.found:
                return
        rest = watch.feed(decoder.flush())
        yield rest + watch.flush(), -1, None

    def _steps(self, ids: list[int], row: int) -> Iterator[tuple[int, float | None]]:
        config = self.config
        filters = Filters(
            config.temperature,
            config.top_k,
            config.top_p,
            config.min_p,
            config.repetition_penalty,
        )
        if not isinstance(self.model, GPT):
            yield from self.model.stream(
                ids,
                config.max_new_tokens,
                **vars(filters),
                seed=self.seed,
                row=row,
                probabilities=config.json,
            )
            return
        for step in stream(
            self.model,
            torch.tensor([ids], device=self.model.token_weight.device),
            config.max_new_tokens,
            filters=filters,
            seed=self.seed,
            first_row=row,
            probabilities=config.json,
        ):
            probability = None if step.probabilities is None else float(step.probabilities)
            yield int(step.tokens), probability


def run(config: SampleConfig) -> int:
    """Load, read the prompt, write. Returns the exit code."""
    device = machine.resolve_device(config.device)
    machine.check_kernels(config.kernels, device)
    machine.set_threads(config.threads)
    if config.prompt is not None and config.file is not None:
        raise UsageError("--prompt and --file exclude each other")
    if config.chat and config.json:
        raise UsageError("--chat and --json exclude each other")
    model, tokenizer = _load(config, device)
    seed = int(torch.seed() % 2**62) if config.seed is None else config.seed
    writer = Writer(model, tokenizer, config, seed)
    if config.chat:
        return _chat(writer)
    prompt = _read_prompt(config)
    ids = writer.encode(prompt)
    return _print_json(writer, ids) if config.json else _print_text(writer, ids, prompt)


def _load(config: SampleConfig, device: torch.device) -> "tuple[GPT | Engine, Tokenizer]":
    """What computes, by --engine, and the tokenizer.

    `auto` is the native engine on a CPU where it is built. An exported model.pt is read by that
    engine alone.
    """
    exported = Path(config.model).suffix == native.EXPORT_SUFFIX
    reason = _why_not_native(config, device, exported)
    if exported:
        if reason is not None:
            raise UsageError(f"{config.model} is an export, for the native engine: {reason}")
        engine = native.open_file(config.model, config.threads or 0)
        return engine, _tokenizer_of(engine, config.model)
    if reason is not None and config.engine == "native":
        raise UsageError(f"--engine native: {reason}")
    model, tokenizer = checkpoint.load(config.model, "cpu" if reason is None else device)
    if tokenizer is None:
        raise InputError(f"{config.model} holds no tokenizer, so it cannot write text")
    if reason is None:
        return native.engine_for(model, config.threads or 0), tokenizer
    if config.kernels == "triton":
        shape = model.config
        width = shape.n_embd // shape.n_head
        try:
            refuse_shape(device, shape.n_head, width, model.token_weight.dtype)
        except RuntimeError as error:
            raise UsageError(f"--kernels triton: {error}; use auto") from None
    return model.set_kernels(config.kernels), tokenizer


def _why_not_native(config: SampleConfig, device: torch.device, exported: bool) -> str | None:
    """Why the native engine is not what computes, or None where it is."""
    if config.engine == "torch":
        return "--engine torch was asked for"
    if config.kernels != "auto":
        return f"--kernels {config.kernels} is for --engine torch"
    faster = config.device == "auto" and config.engine == "auto" and not exported
    if device.type != "cpu" and (config.device != "auto" or faster):
        return f"it computes on the CPU, not on {device}"
    return native.why_not() or None


def _tokenizer_of(engine: "Engine", path: str) -> Tokenizer:
    if not engine.tokenizer_json:
        raise InputError(f"{path} holds no tokenizer, so it cannot write text")
    tokenizer = tokenizer_from_dict(json.loads(engine.tokenizer_json))
    if tokenizer.vocab_size != engine.config["vocab_size"]:
        raise InputError(f"{path} is damaged: its tokenizer does not fit its configuration")
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


def _print_text(writer: Writer, ids: list[int], prompt: str) -> int:
    count = writer.config.num_samples
    for row in range(count):
        if count > 1:
            print(f"--- {row + 1} of {count} ---")
        sys.stdout.write(prompt)
        for text, _, _ in writer.write(ids, row):
            if text:
                sys.stdout.write(text)
                sys.stdout.flush()
        print()
    return 0


def _print_json(writer: Writer, ids: list[int]) -> int:
    samples = []
    for row in range(writer.config.num_samples):
        pieces = list(writer.write(ids, row))
        drawn = [(token, probability) for _, token, probability in pieces if token >= 0]
        samples.append(
            {
                "text": "".join(text for text, _, _ in pieces),
                "tokens": [token for token, _ in drawn],
                "token_probs": [probability for _, probability in drawn],
            }
        )
    print(json.dumps({"samples": samples, "seed": writer.seed, "prompt_tokens": len(ids)}))
    return 0


def _chat(writer: Writer) -> int:
    """Answer line by line. The history is one growing text, as the model knows no turns.

    Without --stop an answer ends at an empty line. Ctrl-C ends an answer, Ctrl-D the chat.
    """
    import dataclasses

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
        try:
            ids = writer.encode(history + line + "\n")
            history += line + "\n"
            for piece, _, _ in writer.write(ids, turn):
                history += piece
                sys.stdout.write(piece)
                sys.stdout.flush()
        except InputError as error:
            print(f"{error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print("\n(interrupted)", file=sys.stderr)
        print(flush=True)
        history += "" if history.endswith("\n") else "\n"
        turn += 1
