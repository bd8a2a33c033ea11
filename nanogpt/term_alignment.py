"""Self-alignment of a GPT with terms of a domain: the policy, what a sample is worth, the measures.

`self_align.py` has the method, which knows no model: rounds of a `Policy` and a reward.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nanogpt import machine
from nanogpt.config import default_learning_rate
from nanogpt.data import gather
from nanogpt.decoding import generate
from nanogpt.errors import InputError
from nanogpt.model import GPT
from nanogpt.offline_rl import RewardWeightedConfig, RewardWeightedTrainer
from nanogpt.records import Examples
from nanogpt.reward_decoding import generate_reward_augmented
from nanogpt.rewards import combine, term_reward_fn
from nanogpt.self_align import Samples, SelfAlignConfig, SelfAlignTrainer
from nanogpt.text_measures import (
    distinct_n,
    longest_common_substring,
    self_overlap,
    term_rate,
    whole_words,
)
from nanogpt.text_rewards import (
    domain_term_reward,
    repetition_penalty_reward,
    soft_overlong_punishment,
)
from nanogpt.trainer import evaluate

_COMPARED_BYTES = 2**28  # logits of both models at once
_GUARD_WINDOWS = 512
_HELDOUT_TOKENS = 2**16  # of general text, which is read after every round
_CORPUS_CHARACTERS = 2**22  # of original text in which copied pieces are looked for


@dataclass(frozen=True)
class FitConfig:
    """How a GPT writes and is trained in a round.

    Attributes:
        prompt_tokens: original text that a sample continues.
        max_completion_length: tokens of a sample, as far as prompt and sample fit the context.
        epochs: passes over the pool.
        batch_size: texts of an optimizer step.
        learning_rate: peak; None is a fortieth of what training from scratch takes at this width:
            then a round moves about as far as its weights say, and not by what it learns by heart.
        weight_decay: on matrices.
        grad_clip: largest gradient norm; 0 does not clip.
        rows_at_once: texts that are sampled together.
    """

    prompt_tokens: int = 16
    max_completion_length: int = 128
    epochs: int = 3
    batch_size: int = 64
    learning_rate: float | None = None
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    rows_at_once: int = 256


class GPTPolicy:
    """A GPT as a policy of self-alignment.

    Samples continue pieces of original text. Prompt and completion fit the context together, so
    that a text is drawn, scored and trained on at the same positions.

    Args:
        base: where every round begins; it is not changed. It needs a tokenizer.
        anchor: (n,) ids of original text: prompts, and what is mixed in.
        heldout: (m,) ids of original text that no round trains on, of which the first 65,536 are
            used; m may be 0.
        decoder_reward: what distil_beta multiplies in the reward-augmented decoder, see
            `nanogpt.rewards.term_reward_fn`.
        dtype: of the products in training and measuring; drawing is in the model's own.
    Attributes:
        model: the GPT.
        prompt_tokens, completion_tokens: of a sample, here.
    Raises: ValueError where the base has no tokenizer; InputError where the anchor is shorter than
        a sample with its prompt.
    """

    def __init__(
        self,
        base: GPT,
        anchor: np.ndarray,
        heldout: np.ndarray,
        config: FitConfig | None = None,
        *,
        decoder_reward: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if base.tokenizer is None:
            raise ValueError("self-alignment needs the model's tokenizer")
        self.config = config or FitConfig()
        self.base, self.model, self.tokenizer = base, base, base.tokenizer
        self.decoder_reward, self.dtype = decoder_reward, dtype
        self.device = base.token_weight.device
        block, wanted = base.config.block_size, self.config
        self.prompt_tokens = max(1, min(wanted.prompt_tokens, block // 2))
        self.completion_tokens = min(wanted.max_completion_length, block + 1 - self.prompt_tokens)
        if len(anchor) <= self.row_tokens:
            raise InputError(
                f"the anchor text is too short: {len(anchor):,} tokens, no more than one sample "
                f"with its prompt, {self.row_tokens:,}"
            )
        self.anchor, self.heldout = anchor, heldout[:_HELDOUT_TOKENS]

    @property
    def row_tokens(self) -> int:
        """Prompt and completion."""
        return self.prompt_tokens + self.completion_tokens

    def sample(self, n: int, seed: int, *, distil_beta: float | None = None) -> Samples:
        """Draw n texts, each after another piece of the anchor."""
        if distil_beta is not None and self.decoder_reward is None:
            raise ValueError("distil_beta needs a decoder_reward")
        starts = np.random.default_rng(seed).integers(0, len(self.anchor) - self.prompt_tokens, n)
        prompts = torch.from_numpy(gather(self.anchor, starts, self.prompt_tokens - 1))
        end = self.tokenizer.end_of_text_id
        rows = []
        for first in range(0, n, self.config.rows_at_once):
            part = prompts[first : first + self.config.rows_at_once].to(self.device)
            options: dict[str, Any] = {"eos_token_id": end, "seed": seed, "first_row": first}
            new: Any
            if distil_beta is None:
                new = generate(self.model, part, self.completion_tokens, **options)
            else:
                new = generate_reward_augmented(
                    self.model,
                    part,
                    self.completion_tokens,
                    self.decoder_reward,
                    distil_beta,
                    **options,
                )
            rows.append(F.pad(new, (0, self.row_tokens - new.shape[1]), value=end).cpu())
        return self._described(torch.cat(rows), tilted=distil_beta is not None)

    def _described(self, tokens: torch.Tensor, tilted: bool) -> Samples:
        """Samples from their tokens (n, T), with what both models say of them."""
        end, p = self.tokenizer.end_of_text_id, self.prompt_tokens
        new = tokens[:, p:]
        ended = new == end
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1])
        counted = torch.arange(new.shape[1]) < lengths[:, None]
        kl, entropy, nll = self._compared(tokens, counted)
        prompts = [self.tokenizer.decode(row) for row in tokens[:, :p].tolist()]
        written, texts = [], []
        for row, length, before in zip(new.tolist(), lengths.tolist(), prompts, strict=True):
            written.append(self.tokenizer.decode(row[:length]))
            texts.append(whole_words(written[-1], before, cut_off=row[length - 1] != end))
        return Samples(
            written=written,
            texts=texts,
            prompts=prompts,
            n_tokens=lengths,
            counts=torch.ones(len(tokens), dtype=torch.float64),
            kl=kl,
            entropy=entropy,
            base_nll=nll / lengths,
            tokens=tokens,
            tilted=tilted,
        )

    @torch.inference_mode()
    def _compared(self, tokens: torch.Tensor, counted: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """KL of model to base, entropy of the model and NLL of the base along texts, each (n,).

        Args:
            counted: (n, completion) bool, tokens before the end.
        """
        sums: list[torch.Tensor] = []
        row_bytes = 16 * self.row_tokens * self.base.config.vocab_size
        at_once = max(1, min(64, _COMPARED_BYTES // row_bytes))
        for first in range(0, len(tokens), at_once):
            part = tokens[first : first + at_once].to(self.device)
            kept = counted[first : first + at_once].to(self.device)
            base = self._log_probabilities(self.base, part)
            nll = -base.gather(-1, part[:, self.prompt_tokens :, None])[..., 0]
            if self.model is self.base:
                ours, kl = base, torch.zeros_like(nll)
            else:
                ours = self._log_probabilities(self.model, part)
                kl = (ours.exp() * (ours - base)).sum(-1)
            entropy = -(ours.exp() * ours).sum(-1)
            both = torch.stack([kl, entropy, nll]).masked_fill(~kept, 0.0)  # (3, B, completion)
            sums.append(both.cpu().to(torch.float64).sum(-1))
        kl, entropy, nll = torch.cat(sums, 1).clone()
        return kl, entropy, nll

    def _log_probabilities(self, model: GPT, tokens: torch.Tensor) -> torch.Tensor:
        """(B, completion, V) of every token of the completion, given what stands before it."""
        was_training = model.training
        model.eval()
        with machine.autocast(self.device, self.dtype):
            logits, _ = model(tokens[:, :-1])
        model.train(was_training)
        assert logits is not None
        return logits[:, self.prompt_tokens - 1 :].float().log_softmax(-1)

    def fit(self, pool: Samples, weights: torch.Tensor, anchor: float, seed: int) -> "GPTPolicy":
        """A policy trained from the base: completions count as they weigh, prompts do not."""
        config = self.config
        peak = config.learning_rate or default_learning_rate(self.base.config.n_embd) / 40
        examples, n_windows = self._examples(pool, anchor, seed)
        fitted = copy.copy(self)
        fitted.model = copy.deepcopy(self.base).train()
        RewardWeightedTrainer(
            fitted.model,
            RewardWeightedConfig(
                learning_rate=peak,
                num_train_epochs=config.epochs,
                batch_size=config.batch_size,
                weight_decay=config.weight_decay,
                grad_clip=config.grad_clip,
                seed=seed,
            ),
            examples,
            torch.cat([weights, torch.ones(n_windows, dtype=torch.float64)]),
            dtype=self.dtype,
        ).train()
        fitted.model.eval()
        return fitted

    def _examples(self, pool: Samples, anchor: float, seed: int) -> tuple[Examples, int]:
        """The pool's texts, and windows of the anchor that hold its share of all targets."""
        assert pool.tokens is not None
        p, length = self.prompt_tokens, self.row_tokens - 1
        n_windows = round(int(pool.n_tokens.sum()) * anchor / (1 - anchor) / length)
        starts = np.random.default_rng(seed).integers(0, len(self.anchor) - length, n_windows)
        tokens = np.concatenate([pool.tokens.numpy(), gather(self.anchor, starts, length)])
        rows = np.arange(len(tokens))
        n_tokens = pool.n_tokens.numpy()
        examples = Examples(
            tokens=tokens.reshape(-1).astype(self.tokenizer.dtype),
            starts=rows * (length + 1),
            lengths=np.concatenate([n_tokens + p - 1, np.full(n_windows, length)]),
            first_counted=np.where(rows < len(n_tokens), p - 1, 0),
            records=rows,
            n_records=len(rows),
        )
        return examples, n_windows

    def general_nll(self) -> float | None:
        """Mean nats per target on the held-out text."""
        if len(self.heldout) < 2:
            return None
        return evaluate(self.model, self.heldout, device=self.device, dtype=self.dtype)

    def state(self) -> dict[str, Any]:
        """The weights."""
        return {"model": self.model.state_dict()}

    def with_state(self, state: dict[str, Any]) -> "GPTPolicy":
        """The policy of other weights."""
        loaded = copy.copy(self)
        loaded.model = copy.deepcopy(self.base)
        loaded.model.load_state_dict(state["model"])
        return loaded

    def usual_nll(self, quantile: float = 0.95) -> float:
        """The base's mean nats per token which only 1 - quantile of held-out windows exceed.

        Windows are as long as samples, and predicted after as long a prompt; inf without any.
        """
        last = len(self.heldout) - self.row_tokens
        if last < 0:
            return math.inf
        starts = np.unique(np.linspace(0, last, _GUARD_WINDOWS).astype(np.int64))
        rows = torch.from_numpy(gather(self.heldout, starts, self.row_tokens - 1))
        counted = torch.ones(len(rows), self.completion_tokens, dtype=torch.bool)
        of_base = copy.copy(self)
        of_base.model = self.base
        _, _, nll = of_base._compared(rows, counted)
        return float((nll / self.completion_tokens).quantile(quantile))


class AlignmentReward:
    """What a sample of self-alignment is worth.

    1 - 2^(-d) for d different whole terms, so that every further one adds half as much; less the
    share of three-word phrases that are repeated; less what it lacks in fluency: the nats per token
    by which the base finds it less likely than nearly all real text; less, where samples end by
    themselves, up to 1 for not coming to an end.

    Args:
        terms: case ignored.
        usual_nll: what the base's nats per token may be; see `GPTPolicy.usual_nll`.
        longest: tokens at which a text that should end is cut off; None where texts do not end.
    """

    def __init__(
        self, terms: Sequence[str], *, usual_nll: float = math.inf, longest: int | None = None
    ) -> None:
        self.terms = domain_term_reward(terms)
        self.usual_nll = usual_nll
        penalties: list[tuple[Any, float]] = [(repetition_penalty_reward(3, unit="words"), 1.0)]
        if longest is not None:
            penalties.append((soft_overlong_punishment(longest, max(1, longest // 8)), 1.0))
        self.penalties: Any = combine(penalties)

    def accepts(self, samples: Samples) -> torch.Tensor:
        """Which samples hold a term, (n,) bool."""
        return self._different(samples) > 0

    def __call__(self, samples: Samples) -> torch.Tensor:
        """(n,) float64."""
        lengths = samples.n_tokens.tolist()
        penalties = self.penalties(
            prompts=samples.prompts,
            completions=samples.texts,
            completion_ids=[range(length) for length in lengths],
        )
        terms = 1 - 0.5 ** self._different(samples).to(torch.float64)
        guard = (samples.base_nll - self.usual_nll).clamp(min=0)
        return terms + torch.tensor(penalties, dtype=torch.float64) - guard

    def _different(self, samples: Samples) -> torch.Tensor:
        return torch.tensor([len(self.terms.matches(text)) for text in samples.texts])


class TextMeasures:
    """Variety, copying and term rates of samples, as metrics of a round.

    distinct_1 to distinct_3, self_overlap, longest_copied_characters; for rewarded terms (term) and
    those that only judge (heldout_term): {}_rate, matches per 1,000 tokens, and {}s_per_text,
    different ones in a text, each with its standard error {}_se; unwritten_terms, the rewarded ones
    that no sample has.

    Args:
        terms: those that are rewarded.
        heldout_terms: those that only judge; may be empty.
        corpus: original text, for what is copied from it; of a long one the beginning.
    """

    def __init__(self, terms: Sequence[str], heldout_terms: Sequence[str], corpus: str) -> None:
        self.terms = domain_term_reward(terms)
        self.heldout_terms = domain_term_reward(heldout_terms) if heldout_terms else None
        self.corpus = corpus[:_CORPUS_CHARACTERS]

    def __call__(self, samples: Samples) -> dict[str, Any]:
        texts, lengths = samples.texts, samples.n_tokens.tolist()
        measured: dict[str, Any] = {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)}
        measured["self_overlap"] = self_overlap(texts)
        measured["longest_copied_characters"] = longest_common_substring(texts, self.corpus)
        for name, terms in (("term", self.terms), ("heldout_term", self.heldout_terms)):
            if terms is None:
                continue
            found = [terms.matches(text) for text in texts]
            rate = term_rate(found, lengths)
            measured |= {
                f"{name}_rate": rate.per_1000_tokens,
                f"{name}_rate_se": rate.per_1000_tokens_se,
                f"{name}s_per_text": rate.per_text,
                f"{name}s_per_text_se": rate.per_text_se,
            }
            if terms is self.terms:
                seen = set().union(*found)
                measured["unwritten_terms"] = [term for term in terms.terms if term not in seen]
        return measured


def split_terms(terms: Sequence[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Terms to reward and a third that only judges, each in the order given.

    Of three terms or more at least one judges, of fewer none. Terms that differ in case alone count
    once.
    """
    different: dict[str, str] = {}
    for term in terms:
        different.setdefault(term.strip().casefold(), term.strip())
    n = len(different)
    count = max(1, round(n / 3)) if n >= 3 else 0
    held = set(np.random.default_rng(seed).permutation(n)[:count].tolist())
    rewarded = [term for i, term in enumerate(different.values()) if i not in held]
    return rewarded, [term for i, term in enumerate(different.values()) if i in held]


def make_self_alignment(
    model: GPT,
    terms: Sequence[str],
    anchor: np.ndarray | None = None,
    config: SelfAlignConfig | None = None,
    fit: FitConfig | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    note: Callable[[str], None] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> SelfAlignTrainer:
    """Self-alignment of a GPT with terms of a domain, ready to `train` or to be driven by `step`.

    A third of the terms only judges. The last tenth of the anchor is held out: it says what general
    text costs, and how fluent real text is to the base.

    Args:
        model: the base, on its device; it is not changed.
        terms: at least one.
        anchor: ids of original text; None lets the base write it.
        note: called with a sentence for the user.
        progress: see `SelfAlignTrainer`.
    Returns: a trainer; its policy's `model` is the result.
    Raises: InputError for a term that the vocabulary cannot write, or an anchor that is too short;
        ValueError for no terms.
    """
    config = config or SelfAlignConfig()
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError("self-alignment needs the model's tokenizer")
    rewarded, judging = split_terms(terms, config.seed)
    for term in rewarded + judging:
        term_reward_fn([term], tokenizer)
    if not judging and note is not None:
        note("with fewer than three terms none is held out to judge by")
    if anchor is None:
        anchor = _own_text(model, config, fit or FitConfig())
    cut = len(anchor) - max(2, len(anchor) // 10)
    policy = GPTPolicy(
        model,
        anchor[:cut],
        anchor[cut:],
        fit,
        decoder_reward=term_reward_fn(rewarded, tokenizer),
        dtype=dtype,
    )
    ends = bool((anchor[:_CORPUS_CHARACTERS] == tokenizer.end_of_text_id).mean() > 1 / 1000)
    reward = AlignmentReward(
        rewarded,
        usual_nll=policy.usual_nll(),
        longest=policy.completion_tokens if ends else None,
    )
    corpus = tokenizer.decode(np.asarray(anchor[: min(cut, _CORPUS_CHARACTERS)]).tolist())
    return SelfAlignTrainer(
        policy,
        reward,
        config,
        accepts=reward.accepts,
        measure=TextMeasures(rewarded, judging, corpus),
        progress=progress,
    )


def _own_text(model: GPT, config: SelfAlignConfig, fit: FitConfig) -> np.ndarray:
    """Samples of a model, one after the other, each begun by the special token."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    end, n = tokenizer.end_of_text_id, max(64, config.num_generations // 2)
    length = min(fit.max_completion_length, model.config.block_size)
    rows = []
    for first in range(0, n, fit.rows_at_once):
        prompts = torch.full((min(fit.rows_at_once, n - first), 1), end)
        prompts = prompts.to(model.token_weight.device)
        written = generate(
            model, prompts, length, eos_token_id=end, seed=config.seed, first_row=first
        )
        assert isinstance(written, torch.Tensor)
        for row in written.tolist():
            stop = row.index(end, 1) if end in row[1:] else len(row)
            rows += row[:stop]
    return np.array(rows, dtype=tokenizer.dtype)
