"""Writing with rewards: every step's distribution is tilted by what the next token earns.

    q(x) ∝ p(x) exp(beta r(x))

p is what the filters left (repetition penalty, temperature, top-k, top-p, min-p, in this order), so
the equation holds at every temperature. `beta` is a multiplier throughout: 0 is the model itself,
large is greedy, negative shuns rewards.

A tilt of every step is not the tilt of whole texts, which would also have to know what a prefix is
worth later on. `num_particles > 1` closes that gap by sequential Monte Carlo: particles are drawn
from the tilted steps, weighted by each step's normaliser Z, and drawn anew where few of them carry
the weight. As the particles grow in number, texts follow p(y) exp(beta R(y)) / Z, R the sum of the
step rewards, and the estimate of Z is unbiased for any number.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nanogpt import native
from nanogpt.decoding import (
    Filters,
    RowEnder,
    check_prompt,
    fill_beyond_ends,
    generate,
    keep_top_k,
    native_rows,
    philox,
    row_enders,
    stream,
)
from nanogpt.errors import InputError
from nanogpt.rewards import Reward, RewardError, RewardState, as_reward, compiled
from nanogpt.tilt import Tilt, tilt

if TYPE_CHECKING:
    from nanogpt.model import GPT

# Up to this vocabulary every candidate is scored; beyond it, of rewards that are computed one by
# one, this many, as in RAD.
_ALL_CANDIDATES = 1000
_SOME_CANDIDATES = 20
# Streams of the draw; 0 draws tokens.
_RESAMPLING, _LAST_DRAW = 1, 2


@dataclass(frozen=True)
class RewardedGeneration:
    """What `generate_reward_augmented(..., return_details=True)` gives.

    B rows, N particles of each, n new tokens. What is said of tokens is 0 after a row's own end.

    Attributes:
        sequences: (B, T + n) int64, prompt included; of the particle that was drawn.
        token_probabilities: (B, n) float64, the model's probability of each new token, before
            filters and rewards.
        lengths: (B,) int64, the new tokens of each row before it stopped.
        rewards: (B, n) float64, the step reward of each new token; they add up to the text's.
        kl: (B, n) float64, KL(q || p) of each step's tilted distribution, exact, in nats.
        log_normalisers: (B, n) float64, log Z = log E_p exp(beta r) of each step.
        log_z: (B,) float64, of the whole text: exp of it is an unbiased estimate of
            E_p exp(beta R).
        ess: (B,) float64, effective sample size of the particles at the end.
        resamplings: (B,) int64, how often the particles were drawn anew.
        particles: (B, N, T + n) int64.
        weights: (B, N) float64, of the particles; they add up to 1.
    """

    sequences: torch.Tensor
    token_probabilities: torch.Tensor
    lengths: torch.Tensor
    rewards: torch.Tensor
    kl: torch.Tensor
    log_normalisers: torch.Tensor
    log_z: torch.Tensor
    ess: torch.Tensor
    resamplings: torch.Tensor
    particles: torch.Tensor
    weights: torch.Tensor


def generate_reward_augmented(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    reward_fn: Any,
    beta: float,
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
    reward_top_k: int | None = None,
    num_particles: int = 1,
    use_cache: bool = True,
    use_graph: bool | None = None,
    engine: str = "torch",
    return_details: bool = False,
) -> torch.Tensor | RewardedGeneration:
    """Continue texts with a distribution that is tilted by rewards.

    Args:
        model, tokens, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop,
            eos_token_id, seed, first_row, use_cache, use_graph: see `nanogpt.decoding.generate`;
            the draw is the same, so that beta 0 gives its tokens. Temperature 0 takes the largest
            log p + beta r.
        reward_fn: a `Reward` (char_reward_fn, term_reward_fn, text_reward_fn, a reward model, a
            combination), or any function of ids (N, T) int64 -> (N,), called once a step for the
            candidates of all rows that go on; its values are of whole prefixes, prompt included.
            An object with `candidates`, `advance` and `select` (see `RewardState`) is used as is.
        beta: a multiplier; finite. At 0 no reward is asked for, but for the details.
        reward_top_k: only so many of the likeliest tokens that the filters left are scored and
            kept; by default all, but 20 of a vocabulary above 1,000 where candidates are scored
            one by one.
        num_particles: above 1, sequential Monte Carlo with so many particles for each row.
        engine: "torch"; "native", the compiled engine for float32 models on the CPU, one particle
            and rewards that it has; "auto", native where it can run.
        return_details: give a `RewardedGeneration`.
    Returns: (B, T + new) int64, as `generate`.
    Raises: ValueError for arguments out of range, and naming the reward and the step (the first
        new token is step 1) where rewards are NaN or +inf, have a wrong shape, leave nothing to
        draw from, or where the function raises; TypeError for what is no reward; RuntimeError
        where engine="native" cannot run, with the reason.
    Source: Deng and Raffel 2023, RAD (arXiv:2310.09520); Zhao et al. 2024, twisted sequential Monte
        Carlo (arXiv:2404.17546), algorithm 1 without twists.
    """
    reward = as_reward(reward_fn)
    reward.check_model(model)
    filters = Filters(temperature, top_k, top_p, min_p, repetition_penalty)
    _check(model, tokens, max_new_tokens, beta, first_row, reward_top_k, num_particles, temperature)
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    rows = len(tokens) * num_particles
    ended = row_enders(model.tokenizer, rows, stops, eos_token_id)
    if seed is None and temperature > 0:
        seed = int(torch.randint(2**62, ()))
    if _picks_native(engine, model, reward, num_particles, beta, use_cache and not use_graph):
        return _written_natively(
            model, tokens, max_new_tokens, reward, beta, ended, eos_token_id, return_details,
            filters=filters, seed=seed, first_row=first_row, reward_top_k=reward_top_k,
        )  # fmt: skip
    reward_top_k = _candidates(reward, reward_top_k, model.config.vocab_size)
    tilting = _Tilting(
        reward,
        tokens.repeat_interleave(num_particles, 0),
        model.config.vocab_size,
        beta,
        ended=ended,
        reward_top_k=reward_top_k,
        details=return_details or num_particles > 1,
        particles=_Particles(len(tokens), num_particles, seed or 0, first_row),
        last=tokens.shape[1] + max_new_tokens - 1,
    )
    was_training = model.training
    model.eval()
    columns = _Columns()
    try:
        for step in stream(
            model,
            tilting.prompt,
            max_new_tokens,
            filters=filters,
            seed=seed,
            first_row=first_row * num_particles,
            use_cache=use_cache,
            use_graph=use_graph,
            probabilities=return_details,
            steering=tilting,
        ):
            columns.add(
                {"new": step.tokens, "probability": step.probabilities, **tilting.of_step},
                step.ancestors,
            )
            if not any(tilting.running):
                break
    finally:
        model.train(was_training)
    return _result(model, tokens, columns, tilting, eos_token_id, return_details)


@dataclass(frozen=True)
class RewardedStep:
    """One new token of every row and, where asked for, what its reward came to.

    Attributes:
        tokens: (B,) int64.
        probabilities: (B,) float64, the model's, before filters and rewards; or None.
        rewards, kl, log_z: (B,) float64, of this step, as in `RewardedGeneration`; or None.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor | None
    rewards: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    log_z: torch.Tensor | None = None


def stream_reward_augmented(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    reward_fn: Any,
    beta: float,
    *,
    filters: Filters,
    seed: int | None = None,
    first_row: int = 0,
    reward_top_k: int | None = None,
    probabilities: bool = False,
    details: bool = False,
) -> Iterator[RewardedStep]:
    """Yield new tokens one step at a time, with one particle, in torch; nothing ends a row.

    Same arguments as `generate_reward_augmented`; the model is to be in evaluation mode.
    """
    reward = as_reward(reward_fn)
    reward.check_model(model)
    _check(model, tokens, max_new_tokens, beta, first_row, reward_top_k, 1, filters.temperature)
    tilting = _Tilting(
        reward,
        tokens,
        model.config.vocab_size,
        beta,
        ended=None,
        reward_top_k=_candidates(reward, reward_top_k, model.config.vocab_size),
        details=details,
        particles=_Particles(len(tokens), 1, 0, first_row),
        last=tokens.shape[1] + max_new_tokens - 1,
    )
    for step in stream(
        model,
        tokens,
        max_new_tokens,
        filters=filters,
        seed=seed,
        first_row=first_row,
        probabilities=probabilities,
        steering=tilting,
    ):
        of_step = tilting.of_step
        yield RewardedStep(
            step.tokens,
            step.probabilities,
            of_step.get("reward"),
            of_step.get("kl"),
            of_step.get("log_z"),
        )


class _Tilting:
    """The steering of one generation: asks for rewards, tilts, and knows which rows go on.

    Rows here are particles: `particles.count` of them follow each other for every row of the user.
    """

    def __init__(
        self,
        reward: Reward,
        prompt: torch.Tensor,
        vocab_size: int,
        beta: float,
        *,
        ended: list[RowEnder] | None,
        reward_top_k: int | None,
        details: bool,
        particles: "_Particles",
        last: int,
    ) -> None:
        self.reward, self.prompt, self.vocab_size, self.beta = reward, prompt, vocab_size, beta
        self.ended, self.reward_top_k, self.details = ended, reward_top_k, details
        self.particles, self.last = particles, last
        self.reads_hidden = reward.reads_hidden
        self.running = [True] * len(prompt)
        self.lengths = [0] * len(prompt)
        self.active: torch.Tensor | None = None  # rows that go on; None is all
        self.of_step: dict[str, torch.Tensor] = {}
        self._step = 0
        self._scored: torch.Tensor | None = None
        self._tilt: Tilt | None = None
        self._vector: torch.Tensor | None = None
        self._state: RewardState | None = None
        self._forbids = True
        if reward.kind == "last token":
            self._vector = self._asked(lambda: reward.token_rewards(vocab_size), "at the start")
            self._vector = self._vector.to(prompt.device, torch.float64)
            self._refuse_bad(self._vector, torch.ones_like(self._vector, dtype=torch.bool))
            self._forbids = not bool(self._vector.isfinite().all())
            self._move = self._vector * beta if beta else torch.zeros_like(self._vector)
        elif beta or details:
            self._state = self._asked(lambda: reward.begin(prompt), "at the start")

    def steer(self, kept: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """(B, V) float64: what the filters kept plus beta times the rewards."""
        self._step += 1
        self._scored = None
        if self._state is not None and hidden is not None and self.reads_hidden:
            state = self._state
            self._asked(lambda: state.see(self._of_active(hidden)))
        if self.beta == 0:
            self._tilt = None
            return kept
        if self.reward_top_k is not None and self.reward_top_k < self.vocab_size:
            kept = keep_top_k(kept, self.reward_top_k)
        if self._vector is not None and not self.details and not self._forbids:
            return kept + self._move
        left = kept > -math.inf
        rewards = self._rewards(kept)  # (B, V)
        self._refuse_bad(rewards, left)
        moved = kept + torch.where(left, self.beta * rewards, 0.0)
        dead = (moved == -math.inf).all(-1)
        some_dead = bool(dead.any())
        if some_dead:
            if self.particles.count == 1:
                self._refuse_dead()
            rewards = rewards.masked_fill(dead[:, None], 0.0)
            moved = torch.where(dead[:, None], kept, moved)
        if self.details:
            self._scored, self._tilt = rewards, tilt(kept, rewards, self.beta)
            if some_dead:
                self._tilt.log_z[dead] = -math.inf
        return moved

    def advance(self, chosen: torch.Tensor, end: int) -> torch.Tensor | None:
        """Take what was drawn; rows that end are asked about no more."""
        if self.details:
            self._note(chosen)
        if self._state is not None:
            state = self._state
            self._asked(lambda: state.advance(self._of_active(chosen)))
        went_on = list(self.running)
        if self.ended is None:
            self.lengths = [length + 1 for length in self.lengths]
        else:
            for row, token in enumerate(chosen.tolist()):
                if self.running[row]:
                    self.lengths[row] += 1
                    self.running[row] = not self.ended[row](token)
        if self.running != went_on:
            self._go_on_with([row for row, going in enumerate(went_on) if going])
        if self.particles.count == 1:
            return None
        self.particles.weigh(self.of_step["log_z"])
        if self.particles.all_dead():
            self._refuse_dead()
        if end == self.last or not any(self.running):
            return None
        ancestors = self.particles.resample(end, self.running)
        return None if ancestors is None else self._become(ancestors)

    def select(self, rows: torch.Tensor) -> None:
        """Go on with other rows, where nothing ends a row; a row may come several times."""
        if not torch.equal(rows, torch.arange(len(self.running))):
            self.running, self.lengths = [True] * len(rows), [0] * len(rows)
            self._narrow(list(range(len(rows))), rows.tolist())

    def _note(self, chosen: torch.Tensor) -> None:
        """Reward, KL and log Z of this step; 0 for rows that have ended."""
        nothing = torch.zeros(len(chosen), dtype=torch.float64, device=chosen.device)
        if self._scored is not None and self._tilt is not None:
            reward = self._scored.gather(1, chosen[:, None])[:, 0]
            kl, log_z = self._tilt.kl, self._tilt.log_z
        else:  # beta 0: nothing was asked before the draw
            kl, log_z = nothing, nothing
            reward = self._rewards_of(chosen)
        values = torch.stack([reward, kl, log_z])
        if self.active is not None:
            values = torch.zeros_like(values).index_copy_(
                1, self.active, values.index_select(1, self.active)
            )
        self.of_step = dict(zip(("reward", "kl", "log_z"), values, strict=True))

    def _rewards(self, kept: torch.Tensor) -> torch.Tensor:
        """(B, V) float64, step rewards of what is kept; 0 for rows that have ended."""
        if self._vector is not None:
            if self.active is None:
                return self._vector.expand(len(kept), -1)
            going = self._vector.expand(len(self.active), -1)
            return torch.zeros_like(kept).index_copy_(0, self.active, going)
        assert self._state is not None
        state, of_active = self._state, self._of_active(kept)
        if self.reward.scores_all:
            rewards = self._asked(lambda: torch.as_tensor(state.candidates()))
            if rewards.dim() == 1:
                rewards = rewards.expand(len(of_active), -1)
            self._check_shape(rewards, of_active.shape)
            rewards = rewards.to(kept.device, torch.float64)
        else:
            width = int((of_active > -math.inf).sum(-1).max())
            ids = of_active.topk(width, dim=-1).indices
            some = self._asked(lambda: torch.as_tensor(state.candidates(ids)))
            self._check_shape(some, ids.shape)
            rewards = torch.zeros(of_active.shape, dtype=torch.float64, device=kept.device)
            rewards.scatter_(1, ids, some.to(kept.device, torch.float64))
        if self.active is None:
            return rewards
        return torch.zeros_like(kept).index_copy_(0, self.active, rewards)

    def _rewards_of(self, chosen: torch.Tensor) -> torch.Tensor:
        """(B,) float64, step rewards of some tokens."""
        if self._vector is not None:
            return self._vector[chosen]
        assert self._state is not None
        state, ids = self._state, self._of_active(chosen)[:, None]
        if self.reward.scores_all:
            rewards = self._asked(lambda: torch.as_tensor(state.candidates()))
            rewards = rewards.expand(len(ids), -1).to(ids.device).gather(1, ids)
        else:
            rewards = self._asked(lambda: torch.as_tensor(state.candidates(ids)))
            self._check_shape(rewards, ids.shape)
        rewards = rewards[:, 0].to(chosen.device, torch.float64)
        if self.active is None:
            return rewards
        nothing = torch.zeros(len(chosen), dtype=torch.float64, device=chosen.device)
        return nothing.index_copy_(0, self.active, rewards)

    def _of_active(self, values: torch.Tensor) -> torch.Tensor:
        return values if self.active is None else values.index_select(0, self.active)

    def _go_on_with(self, before: list[int]) -> None:
        """Narrow the state, which holds the rows `before`, to those that are running."""
        places = [place for place, row in enumerate(before) if self.running[row]]
        self._narrow([before[place] for place in places], places)

    def _become(self, ancestors: torch.Tensor) -> torch.Tensor:
        """Let every row be the one it goes on from."""
        rows = ancestors.tolist()
        before = [row for row, going in enumerate(self.running) if going]
        place_of = {row: place for place, row in enumerate(before)}
        self.running = [self.running[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
        if self.ended is not None:
            self.ended = [self.ended[row].copy() for row in rows]
        after = [row for row, going in enumerate(self.running) if going]
        self._narrow(after, [place_of[rows[row]] for row in after])
        return ancestors.to(self.prompt.device)

    def _narrow(self, rows: list[int], places: list[int]) -> None:
        device = self.prompt.device
        self.active = None if len(rows) == len(self.running) else torch.tensor(rows, device=device)
        if self._state is not None and rows:
            state, chosen = self._state, torch.tensor(places, device=device)
            self._asked(lambda: state.select(chosen))

    def _asked(self, question: Any, when: str | None = None) -> Any:
        """What the reward answers; its failures name it and the step."""
        when = f"at step {self._step}" if when is None else when
        try:
            return question()
        except Exception as error:
            name = self.reward.__name__
            if isinstance(error, RewardError):
                raise RewardError(f"the reward {name!r}: {error}, {when}") from error
            kind = type(error).__name__
            raise RewardError(f"the reward {name!r} raised {kind}: {error} {when}") from error

    def _check_shape(self, rewards: torch.Tensor, shape: torch.Size) -> None:
        if rewards.shape != shape:
            raise RewardError(
                f"the reward {self.reward.__name__!r} gave shape {tuple(rewards.shape)} for "
                f"candidates of shape {tuple(shape)} at step {self._step}"
            )

    def _refuse_bad(self, rewards: torch.Tensor, left: torch.Tensor) -> None:
        move = self.beta * rewards if self.beta else rewards
        bad = left & (rewards.isnan() | (move == math.inf))
        if bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            value = float(rewards[tuple(place)])
            raise RewardError(
                f"the reward {self.reward.__name__!r} gave {value} for token {place[-1]} "
                f"at step {max(1, self._step)}"
            )

    def _refuse_dead(self) -> None:
        raise RewardError(
            f"the reward {self.reward.__name__!r} forbids every token that is left "
            f"at step {self._step}"
        )


class _Particles:
    """Weights of N particles for each of B rows, on the CPU in float64."""

    def __init__(self, rows: int, count: int, seed: int, first_row: int) -> None:
        self.rows, self.count = rows, count
        self._key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
        self._row_numbers = torch.arange(first_row, first_row + rows)
        self.log_weights = torch.zeros(rows, count, dtype=torch.float64)
        self._log_z = torch.zeros(rows, dtype=torch.float64)
        self.resamplings = torch.zeros(rows, dtype=torch.int64)

    @property
    def weights(self) -> torch.Tensor:
        """(B, N), adding up to 1."""
        return self.log_weights.softmax(-1)

    @property
    def log_z(self) -> torch.Tensor:
        """(B,): log of the product of mean weights."""
        return self._log_z + self.log_weights.logsumexp(-1) - math.log(self.count)

    @property
    def ess(self) -> torch.Tensor:
        """(B,), particles."""
        return 1 / self.weights.square().sum(-1)

    def weigh(self, log_z: torch.Tensor) -> None:
        """Multiply by one step's normalisers, (B N,)."""
        self.log_weights = self.log_weights + log_z.cpu().view(self.rows, self.count)

    def all_dead(self) -> bool:
        """Whether some row has no particle of any weight."""
        return bool((self.log_weights == -math.inf).all(-1).any())

    def resample(self, position: int, running: Sequence[bool]) -> torch.Tensor | None:
        """Draw particles anew, systematically, in rows whose ESS is below N / 2.

        Returns: (B N,), which particle each one becomes, or None where no row needs it.
        """
        going = torch.tensor(running).view(self.rows, self.count).any(-1)
        needed = (self.ess < self.count / 2) & going
        if not bool(needed.any()):
            return None
        own = torch.arange(self.count).expand(self.rows, -1)
        even = (own + self._uniform(position, _RESAMPLING)[:, None]) / self.count
        drawn = torch.where(needed[:, None], self._place(even), own)
        self._log_z = torch.where(needed, self.log_z, self._log_z)
        self.log_weights = self.log_weights.masked_fill(needed[:, None], 0.0)
        self.resamplings += needed
        return (drawn + self.count * torch.arange(self.rows)[:, None]).flatten()

    def draw(self, position: int) -> torch.Tensor:
        """(B,), one particle of each row by its weight."""
        return self._place(self._uniform(position, _LAST_DRAW)[:, None])[:, 0]

    def _place(self, points: torch.Tensor) -> torch.Tensor:
        """Where points of [0, 1) fall among the weights, (B, n)."""
        upper = self.weights.cumsum(-1)
        places = torch.searchsorted(upper, points * upper[:, -1:], right=True)
        # Rounding must not lead to a particle without weight.
        last = (self.weights > 0).int().cumsum(-1).argmax(-1, keepdim=True)
        return places.minimum(last)

    def _uniform(self, position: int, purpose: int) -> torch.Tensor:
        """(B,) in (0, 1), a function of seed, position, row and purpose."""
        counter = [torch.tensor(0), torch.tensor(position), self._row_numbers]
        words = philox([*counter, torch.tensor(purpose)], self._key)[0]
        return (words.to(torch.float64) + 0.5) / 2.0**32


class _Columns:
    """What every step gave for every particle, and who goes on from whom."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.ancestors: list[torch.Tensor | None] = []

    def add(self, values: dict[str, torch.Tensor | None], ancestors: torch.Tensor | None) -> None:
        self.steps.append({name: v for name, v in values.items() if v is not None})
        self.ancestors.append(ancestors)

    def lineages(self, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
        """(rows, n) of everything, along the lineages of the particles at the end."""
        line = torch.arange(rows, device=device)
        traced: list[dict[str, torch.Tensor]] = []
        for step, ancestors in zip(reversed(self.steps), reversed(self.ancestors), strict=True):
            if ancestors is not None:
                line = ancestors[line]
            traced.append({name: value[line] for name, value in step.items()})
        traced.reverse()
        names = traced[0] if traced else {}
        return {name: torch.stack([step[name] for step in traced], 1) for name in names}


def _result(
    model: "GPT",
    tokens: torch.Tensor,
    columns: _Columns,
    tilting: _Tilting,
    eos_token_id: int | None,
    return_details: bool,
) -> torch.Tensor | RewardedGeneration:
    rows, count = len(tokens), tilting.particles.count
    of = columns.lineages(rows * count, tokens.device)
    empty = tokens.new_empty(rows * count, 0)
    lengths = torch.tensor(tilting.lengths, device=tokens.device)
    new, beyond = fill_beyond_ends(model, of.get("new", empty), lengths, eos_token_id)
    texts = torch.cat([tilting.prompt, new], 1).view(rows, count, -1)
    drawn = torch.zeros(rows, dtype=torch.int64)
    if count > 1:
        drawn = tilting.particles.draw(tilting.last + 1)
    picked = drawn.to(tokens.device) + count * torch.arange(rows, device=tokens.device)
    sequences = texts.flatten(0, 1)[picked]
    longest = tokens.shape[1] + int(lengths[picked].max())
    if not return_details:
        return sequences[:, :longest]

    def column(name: str) -> torch.Tensor:
        values = of.get(name, empty.to(torch.float64)).masked_fill(beyond, 0.0)
        return values[picked, : longest - tokens.shape[1]]

    return RewardedGeneration(
        sequences[:, :longest],
        column("probability"),
        lengths[picked].cpu(),
        column("reward"),
        column("kl"),
        column("log_z"),
        tilting.particles.log_z if count > 1 else column("log_z").sum(1).cpu(),
        tilting.particles.ess,
        tilting.particles.resamplings,
        texts,
        tilting.particles.weights,
    )


def _check(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    beta: float,
    first_row: int,
    reward_top_k: int | None,
    num_particles: int,
    temperature: float,
) -> None:
    check_prompt(tokens, model.config.vocab_size, model)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not math.isfinite(beta):
        raise ValueError(f"beta must be finite, not {beta}")
    if reward_top_k is not None and reward_top_k < 1:
        raise ValueError(f"reward_top_k must be at least 1, not {reward_top_k}")
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, not {num_particles}")
    if num_particles > 1 and temperature == 0:
        raise ValueError("num_particles above 1 draws, so the temperature must be above 0")
    most = 2**32 // num_particles - len(tokens)
    if not 0 <= first_row <= most:
        raise ValueError(f"first_row must be from 0 to {most}, not {first_row}")


def unfit(model: "GPT", reward: Reward, num_particles: int) -> str | None:
    """Why the compiled engine cannot write with this reward, in words, or None."""
    if num_particles > 1:
        return "it writes one text at a time, and num_particles > 1 needs several"
    reason = native.unfit(model)
    if reason is None and compiled(reward, model.config.vocab_size) is None:
        reason = (
            f"it has rewards of tokens, characters and terms and their sums, and "
            f"{reward.__name__!r} is another"
        )
    return reason


def _picks_native(
    engine: str,
    model: "GPT",
    reward: Reward,
    num_particles: int,
    beta: float,
    with_cache: bool,
) -> bool:
    """Whether `engine` means the compiled one; a named engine never falls back."""
    if engine not in ("auto", "torch", "native"):
        raise ValueError(f"engine must be auto, torch or native, not {engine!r}")
    if engine == "native" and not with_cache:
        raise ValueError("use_cache=False and use_graph=True are of engine='torch'")
    if engine == "torch" or not with_cache:
        return False
    reason = unfit(model, reward, num_particles)
    if engine == "native" and reason is not None:
        raise RuntimeError(f"the native engine cannot write with this reward: {reason}")
    return reason is None


def _written_natively(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    reward: Reward,
    beta: float,
    ended: list[RowEnder] | None,
    eos_token_id: int | None,
    return_details: bool,
    **options: Any,
) -> torch.Tensor | RewardedGeneration:
    try:
        new, values, lengths = native_rows(
            model,
            tokens,
            max_new_tokens,
            ended,
            reward=compiled(reward, model.config.vocab_size),
            beta=beta,
            probabilities=return_details,
            details=return_details,
            **options,
        )
    except InputError as error:  # what it says of rewards is said of the reward's values here
        raise ValueError(f"the reward {reward.__name__!r}: {error}") from None
    new, beyond = fill_beyond_ends(model, new, lengths, eos_token_id)
    sequences = torch.cat([tokens, new], 1)
    if not return_details:
        return sequences
    probabilities, rewards, log_z, kl = values.masked_fill(beyond[..., None], 0.0).unbind(-1)
    one = torch.ones(len(tokens), dtype=torch.float64)
    return RewardedGeneration(
        sequences, probabilities, lengths, rewards, kl, log_z, log_z.sum(1), one,
        torch.zeros(len(tokens), dtype=torch.int64), sequences[:, None], one[:, None],
    )  # fmt: skip


def _candidates(reward: Reward, reward_top_k: int | None, vocab_size: int) -> int | None:
    """How many of the likeliest tokens are scored; None is all."""
    if reward_top_k is None and not reward.scores_all and vocab_size > _ALL_CANDIDATES:
        return _SOME_CANDIDATES
    return reward_top_k


@dataclass(frozen=True)
class BestOfN:
    """What `best_of_n(..., return_details=True)` gives.

    Attributes:
        sequences: (B, T + new) int64, the best text of each row.
        rewards: (B, n) float64, of all texts.
        best: (B,) int64, which of them is the best.
        candidates: (B, n, T + new) int64.
    """

    sequences: torch.Tensor
    rewards: torch.Tensor
    best: torch.Tensor
    candidates: torch.Tensor


def best_of_n(
    model: "GPT",
    tokens: torch.Tensor,
    max_new_tokens: int,
    reward_fn: Any,
    n: int,
    *,
    eos_token_id: int | None = None,
    stop: Sequence[str] | str | None = None,
    first_row: int = 0,
    return_details: bool = False,
    **options: Any,
) -> torch.Tensor | BestOfN:
    """Write n texts for each row, all in one batch, and take the one with the largest reward.

    It moves the distribution by at most log n - (n - 1)/n nats (`tilt.best_of_n_kl_bound`).

    Args:
        model, tokens, max_new_tokens, options: see `nanogpt.decoding.generate`.
        reward_fn: as in `generate_reward_augmented`; texts compare by the sum of step rewards.
        n: texts for each row; ties go to the first.
        first_row: text j of row i is drawn as row (first_row + i) n + j.
    Returns: (B, T + new) int64.
    Raises: ValueError for arguments out of range or rewards that are NaN.
    Source: Beirami et al. 2024 (arXiv:2401.01879).
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    reward = as_reward(reward_fn)
    reward.check_model(model)
    written = generate(
        model,
        tokens.repeat_interleave(n, 0),
        max_new_tokens,
        eos_token_id=eos_token_id,
        stop=stop,
        first_row=first_row * n,
        return_details=True,
        **options,
    )
    assert not isinstance(written, torch.Tensor)
    prompt_length = tokens.shape[1]
    new = written.sequences[:, prompt_length:]
    with torch.inference_mode():
        rewards = reward.totals(written.sequences[:, :prompt_length], new, written.lengths)
    if bool(rewards.isnan().any()):
        raise ValueError(f"the reward {reward.__name__!r} gave nan for a text")
    rewards = rewards.cpu().view(len(tokens), n)
    best = rewards.argmax(-1)
    picked = best.to(tokens.device) + n * torch.arange(len(tokens), device=tokens.device)
    sequences = written.sequences[picked]
    if not return_details:
        return sequences
    return BestOfN(sequences, rewards, best, written.sequences.view(len(tokens), n, -1))


class RewardAugmentedLogitsProcessor:
    """The same tilt as a logits processor of Hugging Face's `generate`.

    beta is a multiplier of the rewards that are added to the scores. Hugging Face runs a user's
    processors before it divides by the temperature T, so there the tilt is by beta / T:
    beta_here = beta_HF / T, where beta_here is that of `generate_reward_augmented`.

    Args:
        reward_fn: as in `generate_reward_augmented`; rewards that read hidden states are refused.
        beta: a multiplier, finite.
        reward_top_k: only so many of the likeliest tokens are scored and kept.
    """

    def __init__(self, reward_fn: Any, beta: float, *, reward_top_k: int | None = None) -> None:
        if not math.isfinite(beta):
            raise ValueError(f"beta must be finite, not {beta}")
        if reward_top_k is not None and reward_top_k < 1:
            raise ValueError(f"reward_top_k must be at least 1, not {reward_top_k}")
        self.reward, self.beta, self.reward_top_k = as_reward(reward_fn), beta, reward_top_k
        if self.reward.reads_hidden:
            raise ValueError(
                f"{self.reward.__name__} reads the model's hidden states, which a logits "
                f"processor does not see"
            )
        self.reset()

    def reset(self) -> None:
        """Forget the texts so far: the next ids are a prompt."""
        self._texts: torch.Tensor | None = None
        self._tilting: _Tilting | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """New scores, (B, V), from ids (B, T) and scores (B, V).

        Ids that go on from the rows of the call before, in any order, belong to the same texts;
        all others begin new ones, of which they are the prompts.
        """
        self._follow(input_ids, scores.shape[-1])
        assert self._tilting is not None
        with torch.inference_mode():
            moved = self._tilting.steer(scores.to(torch.float64), None)
        self._texts = input_ids.clone()
        return moved.to(scores.dtype)

    def _follow(self, input_ids: torch.Tensor, vocab_size: int) -> None:
        rows = self._continued(input_ids)
        if rows is None or self._tilting is None:
            top_k = _candidates(self.reward, self.reward_top_k, vocab_size)
            particles = _Particles(len(input_ids), 1, 0, 0)
            self._tilting = _Tilting(
                self.reward, input_ids, vocab_size, self.beta, ended=None, reward_top_k=top_k,
                details=False, particles=particles, last=-1,
            )  # fmt: skip
            return
        self._tilting.select(rows)
        self._tilting.advance(input_ids[:, -1], input_ids.shape[1] - 1)

    def _continued(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """For every row the row of the call before that it goes on from, or None."""
        before = self._texts
        if before is None or input_ids.shape[1] != before.shape[1] + 1:
            return None
        if torch.equal(input_ids[:, :-1], before):
            return torch.arange(len(before))
        place_of = {tuple(row): place for place, row in enumerate(before.tolist())}
        places = [place_of.get(tuple(row)) for row in input_ids[:, :-1].tolist()]
        if None in places:
            return None
        return torch.tensor([place for place in places if place is not None])
