"""Writing: filters, the counter-based draw, and the loop that turns logits into tokens.

The order is fixed and the same in every engine: repetition penalty, temperature, top-k, top-p,
min-p, draw. All of it is in float64. The draw is Gumbel-max over random words that are a function
of (seed, token id, position, row, stream) alone, so that row i of a batch equals a single run with
`first_row=i`, with the cache on or off.
"""

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nanogpt import native
from nanogpt.cache import KVCache
from nanogpt.tokenizer import StreamDecoder, Tokenizer

if TYPE_CHECKING:
    from nanogpt.model import GPT

_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: Sequence[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter.

    Args:
        counter: four int64 tensors that broadcast together, values below 2^32.
        key: two words below 2^32.
    Returns: four int64 tensors, values below 2^32.
    Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 3.3.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        # The products fill 64 bits; int64 wraps, and the mask undoes the sign of the shift.
        low = c0 * _PHILOX_MULTIPLIERS[0]
        high = c2 * _PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((high >> 32) & _WORD) ^ c1 ^ k0,
            high & _WORD,
            ((low >> 32) & _WORD) ^ c3 ^ k1,
            low & _WORD,
        )
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return [c0, c1, c2, c3]


class GumbelNoise:
    """Standard Gumbel noise for every token id, by position and row.

    noise = -log(-log u), u = (w + 0.5) / 2^32, where w is word `id mod 4` of Philox4x32-10 with
    key = seed and counter = (id div 4, position, row, stream).

    Args:
        seed: 64 bits.
        vocab_size: V.
        rows: B; row numbers are first_row … first_row + B - 1.
        stream: separates independent draws at one position.
    """

    def __init__(
        self,
        seed: int,
        vocab_size: int,
        rows: int,
        *,
        first_row: int = 0,
        stream: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.key = (seed & _WORD, (seed >> 32) & _WORD)
        self.vocab_size, self.stream, self.device = vocab_size, stream, device
        self.rows = torch.arange(first_row, first_row + rows, device=device)
        # A block of positions at once, because a call costs more than its few numbers do.
        self._positions = max(1, min(64, 2**18 // (rows * vocab_size)))
        self._start, self._block = -1, torch.empty(0)

    def at(self, position: int) -> torch.Tensor:
        """(B, V) float64 for the token that will stand at `position` of the text."""
        if not (0 <= position - self._start < len(self._block)):
            self._start, self._block = position, self._compute(position)
        return self._block[position - self._start]

    def _compute(self, position: int) -> torch.Tensor:
        quads = torch.arange((self.vocab_size + 3) // 4, device=self.device)
        positions = torch.arange(position, position + self._positions, device=self.device)
        stream = torch.tensor(self.stream, device=self.device)
        counter = [quads, positions[:, None, None], self.rows[:, None], stream]
        words = torch.stack(philox(counter, self.key), dim=-1)  # (P, B, quads, 4)
        words = words.flatten(-2)[..., : self.vocab_size]
        uniform = (words.to(torch.float64) + 0.5) / 2.0**32
        return -torch.log(-torch.log(uniform))  # (P, B, V)


@dataclass(frozen=True)
class Filters:
    """How logits become the distribution that is drawn from.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest; ties at the edge go to the lower ids.
        top_p: keep the likeliest until they reach this probability together.
        min_p: keep those at least this fraction as likely as the likeliest.
        repetition_penalty: logits of tokens in the text are divided by it where positive and
            multiplied where negative.
    Raises: ValueError for a value out of range.
    Source: Keskar et al. 2019, CTRL, section 4.1 (penalty); Fan et al. 2018 (top-k); Holtzman et
        al. 2020 (top-p); Nguyen et al. 2024 (min-p).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, not {self.min_p}")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(f"repetition_penalty must be above 0, not {self.repetition_penalty}")

    def apply(self, logits: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
        """Logits with what is not kept at -inf; softmax of them is what a draw follows.

        Args:
            logits: (B, V).
            seen: (B, V) bool, tokens that stand in the text; needed for a penalty.
        Returns: (B, V) float64. At temperature 0 only the penalty has been applied.
        """
        x = logits.to(torch.float64)
        if seen is not None and self.repetition_penalty != 1.0:
            penalised = torch.where(x > 0, x / self.repetition_penalty, x * self.repetition_penalty)
            x = torch.where(seen, penalised, x)
        if self.temperature == 0:
            return x
        if self.temperature != 1.0:
            x = x / self.temperature
        if self.top_k is not None and self.top_k < x.shape[-1]:
            x = keep_top_k(x, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            x = _keep_top_p(x, self.top_p)
        if self.min_p is not None and self.min_p > 0:
            # p >= min_p * max p, in logs.
            floor = x.amax(-1, keepdim=True) + math.log(self.min_p)
            x = x.masked_fill(x < floor, float("-inf"))
        return x


def keep_top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    edge = x.topk(k, dim=-1).values[..., -1:]
    above, ties = x > edge, x == edge
    room = k - above.sum(-1, keepdim=True)
    kept = above | (ties & (ties.cumsum(-1) <= room))
    return x.masked_fill(~kept, float("-inf"))


def _keep_top_p(x: torch.Tensor, p: float) -> torch.Tensor:
    ordered, ids = x.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    dropped = torch.zeros_like(x, dtype=torch.bool).scatter(-1, ids, before >= p)
    return x.masked_fill(dropped, float("-inf"))


def window_start(length: int, block_size: int) -> int:
    """First token of the context that predicts token `length` of a text.

    0 while the text fits; after that the window restarts at hop * ceil((length - block) / hop)
    with hop = max(1, block div 4), because learned positions make the old keys wrong.
    """
    if length <= block_size:
        return 0
    hop = max(1, block_size // 4)
    return hop * -((block_size - length) // hop)


class GraphedStep:
    """Logits of the next token for one more token of every row, as one CUDA graph.

    A step of decoding is many small kernels, and launching them takes longer than running them;
    a graph launches all at once. On other devices the same step runs kernel by kernel.

    Args:
        model: in evaluation mode; its weights may change in place, but not move.
        cache: the cache that the graph writes into.
    """

    def __init__(self, model: "GPT", cache: KVCache) -> None:
        self.model, self.cache = model, cache
        batch, device = cache.keys.shape[1], cache.keys.device
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.count = torch.ones(1, dtype=torch.int32, device=device)
        self.logits = torch.empty(0)
        self.hidden = torch.empty(0)  # (B, C), what the logits were made of
        self._graph: torch.cuda.CUDAGraph | None = None
        self._plain = device.type != "cuda"

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, V) for the tokens (B, 1) that follow what the cache holds; valid until called again.

        Raises: ValueError where the cache is full.
        """
        if self.cache.length >= self.model.config.block_size:
            raise ValueError(f"the cache of {self.cache.length} tokens is full")
        self.tokens.copy_(tokens)
        self.count.fill_(self.cache.length + 1)
        if self._graph is None and not self._plain:
            try:
                self._graph = self._capture()
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                warnings.warn(f"no CUDA graph, decoding goes on without: {reason}", stacklevel=2)
                self._plain = True
        if self._graph is None:
            self.logits = self._run()
        else:
            self._graph.replay()
        self.cache.advance(1)
        return self.logits

    def _run(self) -> torch.Tensor:
        """The step itself; the cache is left at its length."""
        length = self.cache.length
        self.cache.count = self.count
        try:
            self.hidden = self.model.next_hidden(self.tokens, self.cache)
            return self.model.head(self.hidden)
        finally:
            self.cache.count, self.cache.length = None, length

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Run twice beside the main stream, so that everything is compiled and allocated, then
        record. What these runs write into the cache is what the first replay writes again."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.tokens.device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(2):
                    self._run()
            torch.cuda.current_stream().wait_stream(aside)
            with torch.cuda.graph(graph):
                self.logits = self._run()
        return graph


@dataclass(frozen=True)
class Step:
    """One new token of every row: ids (B,) int64 and the model's probability of it (B,) float64.

    The probability is softmax(logits) at the calibration temperature (1 where there is none),
    before any filter; None unless asked for. Where `ancestors` (B,) is given, row i goes on from
    what row ancestors[i] has written, this token included.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor | None
    ancestors: torch.Tensor | None = None


class Steering(Protocol):
    """Something that changes the distribution of every step after the filters."""

    reads_hidden: bool

    def steer(self, kept: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """New logits, (B, V) float64, from those that the filters kept.

        Args:
            kept: (B, V) float64; not to be written.
            hidden: (B, C), the model's last hidden states, where `reads_hidden`.
        """

    def advance(self, chosen: torch.Tensor, end: int) -> torch.Tensor | None:
        """Go on with the tokens that were drawn, (B,), at position `end` of the text.

        Returns: None, or for every row the row that it goes on from, (B,) int64.
        """


def stream(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    *,
    filters: Filters,
    seed: int | None = None,
    first_row: int = 0,
    use_cache: bool = True,
    use_graph: bool | None = None,
    probabilities: bool = False,
    steering: Steering | None = None,
) -> Iterator[Step]:
    """Yield new tokens one step at a time; `generate` collects them. Same arguments.

    `steering` comes between the filters and the draw.
    """
    config, device = model.config, tokens.device
    check_prompt(tokens, config.vocab_size, model)
    batch, length = tokens.shape
    text = torch.empty(batch, length + max_new_tokens, dtype=torch.int64, device=device)
    text[:, :length] = tokens
    seen = None
    if filters.repetition_penalty != 1.0:
        seen = torch.zeros(batch, config.vocab_size, dtype=torch.bool, device=device)
        seen.scatter_(1, tokens, True)
    noise = None
    if filters.temperature > 0:
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        noise = GumbelNoise(seed, config.vocab_size, batch, first_row=first_row, device=device)
    cache = None
    if use_cache:
        cache = KVCache(config, batch, dtype=model.token_weight.dtype, device=device)
    one_more = None
    if cache is not None and (use_graph if use_graph is not None else device.type == "cuda"):
        one_more = GraphedStep(model, cache)
    confidence_temperature = model.calibration_temperature or 1.0
    cached, cached_from = (() if cache is None else (cache,)), 0
    hidden = None

    for end in range(length, length + max_new_tokens):
        with torch.inference_mode():
            start = window_start(end, config.block_size)
            if cache is not None and start != cached_from:
                cache.reset()
                cached_from = start
            coming = text[:, start + (0 if cache is None else cache.length) : end]
            if one_more is not None and coming.shape[1] == 1 and cache is not None and cache.length:
                logits = one_more(coming)  # (B, V)
                hidden = one_more.hidden
            elif steering is not None and steering.reads_hidden:
                hidden = model.next_hidden(coming, *cached)
                logits = model.head(hidden)
            else:
                logits = model.next_logits(coming, *cached)
            kept = filters.apply(logits, seen)  # (B, V)
            if steering is not None:
                kept = steering.steer(kept, hidden)
            chosen = (kept if noise is None else kept + noise.at(end)).argmax(-1)  # (B,)
            text[:, end] = chosen
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
            of_chosen = None
            if probabilities:
                wide = logits.to(torch.float64) / confidence_temperature
                of_chosen = wide.softmax(-1).gather(1, chosen[:, None])[:, 0]
            ancestors = None if steering is None else steering.advance(chosen, end)
            if ancestors is not None:
                text[:, : end + 1] = text[ancestors, : end + 1]
                if seen is not None:
                    seen = seen[ancestors]
                if cache is not None:
                    cache.select(ancestors)
        yield Step(chosen, of_chosen, ancestors)


@dataclass(frozen=True)
class Generation:
    """What `generate(..., return_details=True)` gives.

    Attributes:
        sequences: (B, T + new) int64, prompt included.
        token_probabilities: (B, new) float64, the model's probability of each new token; 0 after
            a row's own end.
        lengths: (B,) int64, the new tokens of each row before it stopped.
    """

    sequences: torch.Tensor
    token_probabilities: torch.Tensor
    lengths: torch.Tensor


def generate(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] | str | None = None,
    eos_token_id: int | None = None,
    seed: int | None = None,
    first_row: int = 0,
    use_cache: bool = True,
    use_graph: bool | None = None,
    engine: str = "torch",
    return_details: bool = False,
) -> torch.Tensor | Generation:
    """Continue texts.

    Args:
        model: a GPT; it is put into evaluation mode and back.
        tokens: (B, T) int64, T >= 1, on the model's device; T may exceed the context.
        max_new_tokens: new tokens of each row.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Filters`.
        stop: texts that end a row once it has written one; needs `model.tokenizer`.
        eos_token_id: a token that ends a row.
        seed: 64 bits; without one it is drawn from torch's generator.
        first_row: the number of row 0 in the draw; rows are numbered below 2^32.
        use_cache: False recomputes the whole context for every token (the reference).
        use_graph: replay each step as a CUDA graph; by default on a CUDA device.
        engine: "torch"; "native", the compiled engine for float32 models on the CPU, which draws
            the same tokens but where two are nearly as likely; "auto", native where it can run.
        return_details: give a `Generation` with probabilities.
    Returns: (B, T + new) int64. new = max_new_tokens, unless `stop` or `eos_token_id` ended every
        row earlier; what follows a row's own end is filled with `eos_token_id`, or else with the
        tokenizer's end-of-text token.
    Raises: ValueError for arguments out of range; RuntimeError where engine="native" cannot run,
        with the reason.
    """
    filters = Filters(temperature, top_k, top_p, min_p, repetition_penalty)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not 0 <= first_row <= 2**32 - len(tokens):
        raise ValueError(f"first_row must be from 0 to 2^32 - {len(tokens)}, not {first_row}")
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    check_prompt(tokens, model.config.vocab_size, model)
    ended = row_enders(model.tokenizer, len(tokens), stops, eos_token_id)
    options: dict[str, Any] = {
        "filters": filters,
        "seed": int(torch.randint(2**62, ())) if seed is None and temperature > 0 else seed,
        "first_row": first_row,
        "probabilities": return_details,
    }
    if _picks_native(engine, model, use_cache and not use_graph):
        new, values, lengths = native_rows(model, tokens, max_new_tokens, ended, **options)
        of_new = values[..., 0]
    else:
        options |= {"use_cache": use_cache, "use_graph": use_graph}
        new, of_new, lengths = _columns(model, tokens, max_new_tokens, ended, **options)
    new, beyond = fill_beyond_ends(model, new, lengths, eos_token_id)
    sequences = torch.cat([tokens, new], 1)
    if not return_details:
        return sequences
    return Generation(sequences, of_new.masked_fill(beyond, 0.0), lengths.cpu())


def fill_beyond_ends(
    model: "GPT", new: torch.Tensor, lengths: torch.Tensor, eos_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens (B, new) with a filler after each row's length, and where that is, (B, new)."""
    beyond = torch.arange(new.shape[1], device=new.device) >= lengths.unsqueeze(1)
    filler = eos_token_id
    if filler is None and model.tokenizer is not None:
        filler = model.tokenizer.end_of_text_id
    return new.masked_fill(beyond, 0 if filler is None else filler), beyond


_Enders = list["RowEnder"] | None
_Collected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _columns(
    model: "GPT", tokens: torch.Tensor, max_new_tokens: int, ended: _Enders, **options: Any
) -> _Collected:
    """All rows step by step: ids (B, new), their probabilities (B, new), lengths (B,).

    Until every row has ended; what a row has after its end does not count.
    """
    was_training = model.training
    model.eval()
    chosen: list[torch.Tensor] = []
    probabilities: list[torch.Tensor] = []
    running = [True] * len(tokens)
    lengths = [0] * len(tokens)
    try:
        for step in stream(model, tokens, max_new_tokens, **options):
            chosen.append(step.tokens)
            if step.probabilities is not None:
                probabilities.append(step.probabilities)
            if ended is None:
                continue
            for row, token in enumerate(step.tokens.tolist()):
                if running[row]:
                    lengths[row] += 1
                    running[row] = not ended[row](token)
            if not any(running):
                break
    finally:
        model.train(was_training)
    new = torch.stack(chosen, 1) if chosen else tokens.new_empty(len(tokens), 0)
    of_new = torch.zeros(new.shape, dtype=torch.float64, device=new.device)
    if probabilities:
        of_new = torch.stack(probabilities, 1)
    if ended is None:
        lengths = [new.shape[1]] * len(tokens)
    return new, of_new, torch.tensor(lengths, device=new.device)


def native_rows(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    ended: _Enders,
    *,
    filters: Filters,
    seed: int | None,
    first_row: int,
    probabilities: bool,
    **reward: Any,
) -> _Collected:
    """Row after row in the compiled engine.

    Args:
        reward: of its `stream`: reward, beta, reward_top_k, details.
    Returns: ids (B, new); (B, new, 4) float64, of each its probability, reward, log Z and KL, 0
        where they were not asked for; lengths (B,).
    """
    rows: list[list[int]] = []
    of_rows: list[list[tuple[float, float, float, float]]] = []
    with native.turn(model):
        engine = native.engine_for(model)
        for row, prompt in enumerate(tokens.tolist()):
            ids: list[int] = []
            of_ids: list[tuple[float, float, float, float]] = []
            steps = engine.stream(
                prompt,
                max_new_tokens,
                **vars(filters),
                seed=int(seed or 0) & (2**64 - 1),
                row=first_row + row,
                probabilities=probabilities,
                **reward,
            )
            for token, probability in steps:
                ids.append(token)
                of_ids.append((probability or 0.0, *(steps.details or (0.0, 0.0, 0.0))))
                if ended is not None and ended[row](token):
                    break
            rows.append(ids)
            of_rows.append(of_ids)
    lengths = torch.tensor([len(ids) for ids in rows])
    new = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    of_new = torch.zeros(*new.shape, 4, dtype=torch.float64)
    for row, (ids, of_ids) in enumerate(zip(rows, of_rows, strict=True)):
        new[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        of_new[row, : len(ids)] = torch.tensor(of_ids, dtype=torch.float64).view(-1, 4)
    return new, of_new, lengths


def _picks_native(engine: str, model: "GPT", with_cache: bool) -> bool:
    """Whether `engine` means the compiled one; a named engine never falls back."""
    if engine not in ("auto", "torch", "native"):
        raise ValueError(f"engine must be auto, torch or native, not {engine!r}")
    if engine == "native" and not with_cache:
        raise ValueError("use_cache=False and use_graph=True are of engine='torch'")
    if engine == "auto":
        return with_cache and native.unfit(model) is None
    return engine == "native"


class StopText:
    """Watches a growing text for the first of several stop texts.

    `feed` gives what is certain not to be part of one; `found` turns true once one has appeared,
    and nothing after its beginning is given out.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [text for text in stops if text]
        self.held = ""
        self.found = False

    def feed(self, text: str) -> str:
        if self.found:
            return ""
        self.held += text
        hits = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
        if hits:
            self.found = True
            ready, self.held = self.held[: min(hits)], ""
            return ready
        keep = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready

    def flush(self) -> str:
        """What was held back in case a stop text went on."""
        ready, self.held = self.held, ""
        return ready


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0


class RowEnder:
    """Takes the tokens of one row and says whether it ends with the last of them."""

    def __init__(
        self, tokenizer: Tokenizer | None, stops: Sequence[str], eos_token_id: int | None
    ) -> None:
        self.eos_token_id = eos_token_id
        self.tokenizer = tokenizer if stops else None
        if self.tokenizer is not None:
            self._decoder, self._watch = StreamDecoder(self.tokenizer), StopText(stops)

    def __call__(self, token: int) -> bool:
        if self.tokenizer is None:
            return token == self.eos_token_id
        self._watch.feed(self._decoder.feed(token))
        return token == self.eos_token_id or self._watch.found

    def copy(self) -> "RowEnder":
        """One that has taken the same tokens."""
        return copy.deepcopy(self, {id(self.tokenizer): self.tokenizer})


def row_enders(
    tokenizer: Tokenizer | None, rows: int, stops: Sequence[str], eos_token_id: int | None
) -> list[RowEnder] | None:
    """One for each row, or None where nothing ends a row."""
    if not stops and eos_token_id is None:
        return None
    if stops and tokenizer is None:
        raise ValueError("stop needs the model's tokenizer: load the model with nanogpt.load")
    return [RowEnder(tokenizer, stops, eos_token_id) for _ in range(rows)]


def check_prompt(tokens: torch.Tensor, vocab_size: int, model: "GPT") -> None:
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be (B, T) int64, not {tuple(tokens.shape)} {tokens.dtype!s}")
    if tokens.shape[0] < 1 or tokens.shape[1] < 1:
        raise ValueError(f"tokens {tuple(tokens.shape)} must hold at least one token a row")
    device = model.token_weight.device
    if tokens.device != device:
        raise ValueError(f"tokens are on {tokens.device}, the model is on {device}")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token {low if low < 0 else high} is outside the vocabulary of {vocab_size}"
        )
