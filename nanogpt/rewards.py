"""Rewards of text: of the next token while a model writes, and of whole completions.

Two signatures, both the world's own. A `Reward` is asked by decoding, candidate by candidate;
called with ids (N, T) it gives (N,). A text reward has TRL's signature, (prompts, completions,
completion_ids, **columns) -> one number for each completion, for training and comparisons;
`text_reward_fn` turns one into a `Reward`.

During decoding every reward is a sum of step rewards: what the next token adds. What is known only
for a whole prefix enters as the difference to the prefix before, so that the steps add up to the
value of the text, and the value of an empty text counts as 0.

Rewards are objects of module-level classes with a `__name__`, so that they pickle and errors name
them.
"""

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from nanogpt import native
from nanogpt.errors import InputError
from nanogpt.term_automaton import TermAutomaton, TermRow, fold
from nanogpt.text_rewards import TextRewardFunction, value_of
from nanogpt.tokenizer import END_OF_TEXT, Tokenizer

if TYPE_CHECKING:
    from nanogpt import _C

TextReward = Callable[..., Sequence[float]]


class UnwritableError(InputError, ValueError):
    """A character or term that no token of the vocabulary can write.

    Attributes:
        what: the character or term.
    """

    def __init__(self, what: str, message: str) -> None:
        self.what = what
        super().__init__(message)


class RewardError(ValueError):
    """A reward that gave what cannot be used, or does not fit, in words."""


class RewardState(ABC):
    """A reward on its way through B texts that are being written.

    Decoding calls, for every token: `see` where the reward reads hidden states, `candidates`,
    `advance`; and `select` where rows end, or particles are drawn anew.
    """

    def see(self, hidden: torch.Tensor) -> None:
        """Take the model's last hidden state of every row, (B, C); for `reads_hidden` rewards."""
        del hidden  # most rewards read ids alone

    @abstractmethod
    def candidates(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """What each next token would add to the text's reward.

        Args:
            ids: (B, k) int64, the candidates; None is the whole vocabulary.
        Returns: (B, k); or without ids (B, V), or (V,) where rows do not differ.
        """

    @abstractmethod
    def advance(self, tokens: torch.Tensor) -> None:
        """Go on with the tokens that were written, (B,) int64."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> None:
        """Go on with these rows, (B',) int64; a row may come several times or not at all."""


class Reward(ABC):
    """What a text is worth.

    Attributes:
        __name__: stands in errors and journals.
        kind: "last token", where a step's reward depends on its token alone: `token_rewards` has
            them all, and decoding makes no call per step; "step", where it depends on the text
            before; "prefix", where the value of each prefix is computed, and its step rewards are
            the differences.
        scores_all: whether all candidates cost about as much as one; else decoding asks for the
            likeliest of a large vocabulary only.
        reads_hidden: whether the state needs the model's hidden states (`RewardState.see`).
    """

    __name__: str
    kind: str = "step"
    scores_all: bool = True
    reads_hidden: bool = False

    @abstractmethod
    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rewards of ids: (N, T) int64 -> (N,) float32.

        Of the last token for "last token" rewards, else of the whole text.
        """

    @abstractmethod
    def begin(self, prompt: torch.Tensor) -> RewardState:
        """A state before the first new token after `prompt`, (B, T) int64."""

    def token_rewards(self, vocab_size: int) -> torch.Tensor:
        """(V,) float64, the reward of writing each token, whatever stands before it.

        Raises: TypeError where `kind` is not "last token"; ValueError for another vocabulary.
        """
        raise TypeError(f"the rewards of {self.__name__} depend on more than the last token")

    def check_model(self, model: Any) -> None:
        """Raise ValueError, in words, where this reward cannot go with a GPT."""
        del model  # most rewards go with any

    def totals(
        self, prompt: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Sums of the step rewards of finished texts, (B,) float64.

        Args:
            prompt: (B, T) int64.
            new: (B, n) int64, of which row i counts up to lengths[i].
        """
        state, total = self.begin(prompt), torch.zeros(len(new), dtype=torch.float64)
        rows = torch.arange(len(new))
        lengths = lengths.cpu()
        for step in range(int(lengths.max()) if len(lengths) else 0):
            going = lengths[rows] > step
            if not bool(going.all()):
                state.select(going.nonzero()[:, 0])
                rows = rows[going]
            chosen = new[rows.to(new.device), step]
            total[rows] += state.candidates(chosen[:, None])[:, 0].to("cpu", torch.float64)
            state.advance(chosen)
        return total


class TokenReward(Reward):
    """A fixed reward for some tokens, 0 for the others.

    Args:
        rewards: by id; finite, or -inf, which forbids a token.
        vocab_size: V, or None where only the largest id of `rewards` limits it.
    """

    kind = "last token"

    def __init__(
        self,
        rewards: Mapping[int, float],
        *,
        vocab_size: int | None = None,
        name: str = "token_reward",
    ) -> None:
        self.__name__ = name
        self.rewards, self.vocab_size = dict(rewards), vocab_size
        for token, reward in self.rewards.items():
            if math.isnan(reward) or reward == math.inf:
                raise ValueError(f"the reward of token {token} must be finite or -inf")
            if token < 0 or (vocab_size is not None and token >= vocab_size):
                raise ValueError(f"token {token} is outside the vocabulary of {vocab_size}")

    def token_rewards(self, vocab_size: int) -> torch.Tensor:
        highest = max(self.rewards, default=-1)
        if highest >= vocab_size or self.vocab_size not in (None, vocab_size):
            raise RewardError(
                f"it was made for {self.vocab_size or highest + 1} tokens or more, "
                f"and the model has {vocab_size}"
            )
        vector = torch.zeros(vocab_size, dtype=torch.float64)
        vector[list(self.rewards)] = torch.tensor(list(self.rewards.values()), dtype=torch.float64)
        return vector

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._of(tokens[:, -1]).float()

    def _of(self, tokens: torch.Tensor) -> torch.Tensor:
        """float64, shape and device of `tokens`."""
        size = self.vocab_size or 1 + max([0, *self.rewards])
        table = torch.cat([self.token_rewards(size), torch.zeros(1, dtype=torch.float64)])
        return table.to(tokens.device)[tokens.clamp(max=size)]

    def begin(self, prompt: torch.Tensor) -> RewardState:
        size = self.vocab_size
        if size is None:
            size = 1 + max([*self.rewards, int(prompt.max()) if prompt.numel() else 0])
        return _FixedState(self.token_rewards(size).to(prompt.device))

    def totals(
        self, prompt: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        beyond = torch.arange(new.shape[1]) >= lengths.cpu()[:, None]
        return self._of(new.cpu()).masked_fill(beyond, 0.0).sum(1)


class _FixedState(RewardState):
    """The same rewards at every step; 0 for ids beyond the vector."""

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector
        self._table = torch.cat([vector, vector.new_zeros(1)])

    def candidates(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.vector if ids is None else self._table[ids.clamp(max=len(self.vector))]

    def advance(self, tokens: torch.Tensor) -> None:
        pass

    def select(self, rows: torch.Tensor) -> None:
        pass


def char_reward_fn(
    chars: str | Iterable[str],
    vocabulary: Mapping[str, int] | Tokenizer,
    *,
    reward: float = 1.0,
) -> TokenReward:
    """`reward` for every token that ends with one of some characters.

    With base probability p of these tokens, decoding at multiplier beta gives them
    p e^(beta reward) / (1 - p + p e^(beta reward)), whatever the length of the text.

    Args:
        chars: a text or list of characters.
        vocabulary: character to id (`stoi`), or any Tokenizer; of byte and bpe vocabularies a token
            counts by its last character, if its bytes end with a whole one.
        reward: finite, or -inf, which forbids them.
    Raises: UnwritableError, a ValueError, naming a character that no token ends with; ValueError
        where there are no characters.
    """
    wanted = list(dict.fromkeys(chars))
    if not wanted:
        raise ValueError("there are no characters to reward")
    name = f"char_reward({''.join(wanted)!r})"
    found: dict[str, list[int]] = {character: [] for character in wanted}
    size = None
    if isinstance(vocabulary, Mapping):
        for character in wanted:
            if character in vocabulary:
                found[character].append(int(vocabulary[character]))
    else:
        size = vocabulary.vocab_size
        for token, raw in enumerate(vocabulary.token_bytes):
            character = _last_character(raw)
            if character in found:
                found[character].append(token)
    for character, ids in found.items():
        if not ids:
            raise UnwritableError(
                character,
                f"no token of the vocabulary ends with the character {character!r}, "
                f"so it cannot be rewarded",
            )
    rewards = {token: float(reward) for ids in found.values() for token in ids}
    return TokenReward(rewards, vocab_size=size, name=name)


def _last_character(raw: bytes) -> str:
    """The character that bytes end with, or "" where they end inside one or with none."""
    for width in range(1, 5):
        try:
            return raw[-width:].decode() if len(raw) >= width else ""
        except UnicodeDecodeError:
            continue
    return ""


_LONGEST_TERM = 1000


class TermReward(Reward):
    """What a token adds to a text's progress through a list of terms; see `term_reward_fn`."""

    kind = "step"

    def __init__(self, terms: Iterable[str], tokenizer: Tokenizer) -> None:
        self.terms = list(terms)
        self.tokenizer = tokenizer
        self.__name__ = "term_reward"
        self.compiled: _C.Reward | None = None
        if not self.terms:
            raise ValueError("there are no terms to reward")
        self._automaton = TermAutomaton([_checked_term(t) for t in self.terms], tokenizer)
        for term in self.terms:
            missing = next((c for c in fold(term) if not self._automaton.writes(c)), None)
            if missing is not None:
                raise UnwritableError(
                    term,
                    f"the vocabulary cannot write the term {term!r}: "
                    f"no token holds the character {missing!r}",
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return TermReward, (self.terms, self.tokenizer)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        worth = []
        for ids in tokens.tolist():
            row = TermRow(self._automaton)
            worth.append(sum(row.advance(token) for token in ids))
        return torch.tensor(worth, dtype=torch.float32, device=tokens.device)

    def begin(self, prompt: torch.Tensor) -> RewardState:
        first: _TokenRow = _compiled_term_row(self) or TermRow(self._automaton)
        return _RowStates([first.copy() for _ in range(len(prompt))], prompt.device)


def term_reward_fn(terms: Sequence[str], tokenizer: Tokenizer) -> TermReward:
    """Rewards for whole terms as they are written, across token boundaries.

    The step rewards are the differences of a potential, so they add up over a text to the number of
    distinct terms in it plus the progress, below 1, of what is unfinished at its end:

        potential = distinct terms so far + progress of the match under way

    What was given for the beginning of a term is taken back where the text turns away from it, and
    a term counts once however often it comes, so there is nothing to gain from beginnings or
    repetition. Progress is the larger of depth / (length + 1) for the shortest uncounted term that
    the text's end can still become, and of what is certain if the text turns away now. Matching is
    that of (?<!\\w)(?:t1|t2|…)(?!\\w) over the new text alone, longer terms first, leftmost and
    without overlaps, with case folded character by character. A token without bytes (end of text)
    is a boundary.

    Args:
        terms: at least one, none of them empty or longer than 1,000 characters.
        tokenizer: of the model that will write.
    Raises: UnwritableError, a ValueError, for a term that the vocabulary cannot write; ValueError
        for an empty or too long term, or none.
    """
    return TermReward(terms, tokenizer)


def _checked_term(term: str) -> str:
    if not term:
        raise ValueError("one of the terms to reward is empty")
    if len(term) > _LONGEST_TERM:
        raise ValueError(
            f"one of the terms to reward has {len(term)} characters; "
            f"the longest allowed has {_LONGEST_TERM}"
        )
    return fold(term)


class _TokenRow(Protocol):
    """A reward on its way through one text; the compiled engine's have the same methods."""

    def candidates(self) -> Any:
        """(V,) float64, tensor or array."""

    def advance(self, token: int) -> Any: ...

    def copy(self) -> "_TokenRow": ...


def _compiled_term_row(reward: TermReward) -> "_C.Reward | None":
    """A row of the compiled engine at the start of a text, to be copied; None where it is not.

    It is made once: reading a large vocabulary takes longer than writing.
    """
    if not (native.available() and isinstance(reward.tokenizer, Tokenizer)):
        return None
    if reward.compiled is None:
        reward.compiled = native.term_reward(reward.terms, reward.tokenizer)
    return reward.compiled


def compiled(reward: Reward, vocab_size: int) -> "_C.Reward | None":
    """The reward as the compiled engine has it, at the start of a text.

    Those of the last token alone, of terms, and weighted sums of such; None for all others, for
    values that are no numbers, and where there is no engine.
    """
    if not native.available():
        return None
    if reward.kind == "last token":
        values = reward.token_rewards(vocab_size)
        if not bool((values < math.inf).all()):  # NaN too
            return None
        return native.token_reward(values.tolist())
    if isinstance(reward, TermReward):
        return _compiled_term_row(reward)
    if isinstance(reward, CombinedReward):
        # A part of weight 0 is left out: 0 times -inf is no number.
        parts = [(compiled(part, vocab_size), w) for part, w in reward.parts if w]
        known = [(part, weight) for part, weight in parts if part is not None]
        if known and len(known) == len(parts):
            return native.sum_reward(known)
    return None


class _RowStates(RewardState):
    """One `_TokenRow` for each text."""

    def __init__(self, rows: list[_TokenRow], device: torch.device) -> None:
        self.rows, self.device = rows, device

    def candidates(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        rewards = torch.stack([torch.as_tensor(row.candidates()) for row in self.rows])
        rewards = rewards.to(self.device)  # (B, V)
        return rewards if ids is None else rewards.gather(1, ids)

    def advance(self, tokens: torch.Tensor) -> None:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.advance(token)

    def select(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[row].copy() for row in rows.tolist()]


class PrefixReward(Reward):
    """Rewards whose values are computed for whole prefixes, one call a step."""

    kind = "prefix"
    scores_all = False

    def begin(self, prompt: torch.Tensor) -> RewardState:
        return _PrefixState(self, prompt)

    def owners(self, rows: int) -> list[int]:
        """For each row that is written the row of the user's that it belongs to."""
        return list(range(rows))

    @abstractmethod
    def values(
        self, texts: torch.Tensor, prompt_length: int, owners: Sequence[int]
    ) -> torch.Tensor:
        """Values of prefixes (N, T) that begin with prompts; owners (N): rows of the user's."""

    def totals(
        self, prompt: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """The values of the finished texts, in one call for each length that occurs."""
        total = torch.zeros(len(new), dtype=torch.float64)
        lengths, owners = lengths.cpu(), self.owners(len(prompt))
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            if length == 0:
                continue
            texts = torch.cat([prompt, new[:, :length]], 1)[rows.to(new.device)]
            values = self.values(texts, prompt.shape[1], [owners[row] for row in rows.tolist()])
            total[rows] = values.to("cpu", torch.float64)
        return total


class _PrefixState(RewardState):
    """Texts so far and their values; a step's reward is the difference."""

    def __init__(self, reward: PrefixReward, prompt: torch.Tensor) -> None:
        self.reward, self.texts, self.prompt_length = reward, prompt, prompt.shape[1]
        self.owners = reward.owners(len(prompt))
        self.value = torch.zeros(len(prompt), dtype=torch.float64, device=prompt.device)
        self._asked: tuple[torch.Tensor, torch.Tensor] | None = None

    def candidates(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        if ids is None:
            raise ValueError(f"{self.reward.__name__} is asked about candidates, not all tokens")
        rows, k = ids.shape
        texts = torch.cat([self.texts.repeat_interleave(k, 0), ids.reshape(-1, 1)], 1)
        owners = [owner for owner in self.owners for _ in range(k)]
        values = self.reward.values(texts, self.prompt_length, owners)
        values = values.to(ids.device, torch.float64).view(rows, k)
        self._asked = (ids, values)
        # What follows a forbidden prefix has its own value: -inf - -inf is no number.
        before = self.value.masked_fill(self.value == -math.inf, 0.0)
        return values - before[:, None]

    def advance(self, tokens: torch.Tensor) -> None:
        if self._asked is None or not bool((self._asked[0] == tokens[:, None]).any(1).all()):
            self.candidates(tokens[:, None])
        assert self._asked is not None
        ids, values = self._asked
        place = (ids == tokens[:, None]).int().argmax(1, keepdim=True)
        self.value = values.gather(1, place)[:, 0]
        self.texts = torch.cat([self.texts, tokens[:, None]], 1)
        self._asked = None

    def select(self, rows: torch.Tensor) -> None:
        self.texts, self.value, self._asked = self.texts[rows], self.value[rows], None
        self.owners = [self.owners[row] for row in rows.tolist()]


class IdsReward(PrefixReward):
    """Any function of ids, (N, T) int64 -> (N,), as a reward; see `ids_reward_fn`."""

    def __init__(self, function: Callable[[torch.Tensor], Any], *, per_step: bool = False) -> None:
        self.function, self.per_step = function, per_step
        self.kind = "step" if per_step else "prefix"
        self.__name__ = name_of(function)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.values(tokens, 0, range(len(tokens))).to(torch.float32)

    def begin(self, prompt: torch.Tensor) -> RewardState:
        return _StepState(self, prompt) if self.per_step else _PrefixState(self, prompt)

    def values(
        self, texts: torch.Tensor, prompt_length: int, owners: Sequence[int]
    ) -> torch.Tensor:
        values = torch.as_tensor(self.function(texts))
        if values.shape != (len(texts),):
            raise RewardError(
                f"it gave shape {tuple(values.shape)} for {len(texts)} texts, not ({len(texts)},)"
            )
        return values.detach().to(torch.float64)

    def totals(
        self, prompt: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        sums = Reward.totals if self.per_step else PrefixReward.totals
        return sums(self, prompt, new, lengths)


class _StepState(_PrefixState):
    """Texts so far; the function's value is the step's reward itself."""

    def candidates(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        self.value.zero_()
        return super().candidates(ids)


def ids_reward_fn(function: Callable[[torch.Tensor], Any], *, per_step: bool = False) -> IdsReward:
    """A function of ids as a reward of decoding, called once a step for all candidates.

    Args:
        function: (N, T) int64, prompt and text up to a candidate, -> (N,) numbers.
        per_step: whether its values are rewards of the last step, which add up; else they are
            values of the whole text, of which the last one counts.
    """
    return IdsReward(function, per_step=per_step)


class TextFunctionReward(PrefixReward):
    """A reward in TRL's signature during decoding; see `text_reward_fn`."""

    def __init__(
        self,
        function: TextReward,
        tokenizer: Tokenizer,
        prompts: Sequence[str] | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self.function, self.tokenizer = function, tokenizer
        self.prompts = None if prompts is None else list(prompts)
        self.columns = dict(columns or {})
        self.__name__ = name_of(function)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.values(tokens, 0, range(len(tokens))).to(torch.float32)

    def owners(self, rows: int) -> list[int]:
        """Several texts may be written for each row: particles, or the best of n."""
        given = {"prompts": self.prompts, **self.columns}
        sizes = {name: len(column) for name, column in given.items() if column is not None}
        for name, size in sizes.items():
            if size == 0 or rows % size or size != max(sizes.values()):
                raise RewardError(f"it has {size} {name} for {rows} rows")
        count = max(sizes.values(), default=rows)
        return [row * count // rows for row in range(rows)]

    def values(
        self, texts: torch.Tensor, prompt_length: int, owners: Sequence[int]
    ) -> torch.Tensor:
        rows = texts.tolist()
        completion_ids = [row[prompt_length:] for row in rows]
        if self.prompts is not None and prompt_length:
            prompts = [self.prompts[owner] for owner in owners]
        else:
            prompts = [self._text(row[:prompt_length]) for row in rows]
        columns = {}
        if prompt_length:
            columns = {
                name: [column[owner] for owner in owners] for name, column in self.columns.items()
            }
        completions = [self._text(ids) for ids in completion_ids]
        values = self.function(
            prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
        )
        return _numbers(values, len(rows))

    def _text(self, ids: Sequence[int]) -> str:
        """Text of ids with the special token spelled out, so that no id is invisible."""
        end, parts, run = self.tokenizer.end_of_text_id, [], list[int]()
        for token in ids:
            if token == end:
                parts += [self.tokenizer.decode(run), END_OF_TEXT]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.tokenizer.decode(run)])


def text_reward_fn(
    function: TextReward,
    tokenizer: Tokenizer,
    *,
    prompts: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> TextFunctionReward:
    """A reward in TRL's signature as a reward of decoding.

    It is called once a step, with the texts of all candidates of all rows: `completions` up to and
    with the candidate, the special token spelled out, and `completion_ids`. Its values are values
    of the prefix, so a function that makes sense for finished texts only steers badly.

    Args:
        function: (prompts, completions, completion_ids, **columns) -> one number a completion.
        prompts: what to give as prompts instead of the decoded ones, one for each row.
        columns: further arguments, a sequence of one value for each row.
    """
    return TextFunctionReward(function, tokenizer, prompts, columns)


def _numbers(values: Any, count: int) -> torch.Tensor:
    """What a text reward gave, (count,) float64."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    elif isinstance(values, Sequence):
        odd = next((v for v in values if isinstance(v, str) or not hasattr(v, "__float__")), None)
        if odd is not None or None in values:
            raise RewardError(f"it gave {odd!r} among its rewards, which is no number")
        values = torch.tensor([float(v) for v in values], dtype=torch.float64)
    values = torch.as_tensor(values)
    if values.shape != (count,):
        raise RewardError(f"it gave shape {tuple(values.shape)} for {count} texts, not ({count},)")
    return values.to(torch.float64)


def name_of(function: Any) -> str:
    """What errors and journals call a reward."""
    return str(getattr(function, "__name__", None) or type(function).__name__)


def as_reward(reward_fn: Any) -> Reward:
    """The Reward that a user's `reward_fn` is: one already, or a function of ids.

    Raises: TypeError, in words, for what is neither.
    """
    if isinstance(reward_fn, Reward):
        return reward_fn
    if isinstance(reward_fn, TextRewardFunction) or _takes_completions(reward_fn):
        raise TypeError(
            f"{name_of(reward_fn)} rewards texts: give text_reward_fn({name_of(reward_fn)}, "
            f"tokenizer) to decoding"
        )
    if isinstance(reward_fn, type):
        raise TypeError(f"reward_fn is the class {name_of(reward_fn)}: give an object of it")
    if hasattr(reward_fn, "candidates"):
        return _BegunReward(reward_fn)
    if callable(reward_fn):
        return IdsReward(reward_fn)
    raise TypeError(
        f"reward_fn must be a Reward or a function of ids (N, T) -> (N,), "
        f"not {type(reward_fn).__name__}"
    )


def _takes_completions(function: Any) -> bool:
    try:
        return "completions" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # no function, or a built-in one without a signature
        return False


class _BegunReward(Reward):
    """A state that the user has made: candidates, advance and, for more than one row, select."""

    def __init__(self, state: Any) -> None:
        self.state = state
        self.__name__ = name_of(state)
        self.reads_hidden = bool(getattr(state, "reads_hidden", False))

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{self.__name__} is a state of decoding and knows no other texts")

    def begin(self, prompt: torch.Tensor) -> RewardState:
        missing = [m for m in ("advance", "select") if not hasattr(self.state, m)]
        if missing:
            raise TypeError(f"{self.__name__} has candidates, but no {' and no '.join(missing)}")
        state: RewardState = self.state
        return state


class CombinedReward(Reward):
    """A weighted sum of rewards; see `combine`."""

    def __init__(self, parts: Sequence[tuple[Reward, float]]) -> None:
        self.parts = [(reward, float(weight)) for reward, weight in parts]
        self.__name__ = " + ".join(f"{weight:g} {r.__name__}" for r, weight in self.parts)
        kinds = {reward.kind for reward, _ in self.parts}
        self.kind = kinds.pop() if len(kinds) == 1 else "step"
        self.scores_all = all(reward.scores_all for reward, _ in self.parts)
        self.reads_hidden = any(reward.reads_hidden for reward, _ in self.parts)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        # A part of weight 0 counts nothing: 0 times -inf is no number.
        parts = [weight * reward(tokens) for reward, weight in self.parts if weight]
        return torch.stack(parts).sum(0) if parts else torch.zeros(len(tokens))

    def check_model(self, model: Any) -> None:
        for reward, _ in self.parts:
            reward.check_model(model)

    def token_rewards(self, vocab_size: int) -> torch.Tensor:
        rewards = [w * r.token_rewards(vocab_size) for r, w in self.parts if w]
        return functools.reduce(torch.add, rewards, torch.zeros(vocab_size, dtype=torch.float64))

    def begin(self, prompt: torch.Tensor) -> RewardState:
        return _CombinedState([(reward.begin(prompt), w) for reward, w in self.parts])

    def totals(
        self, prompt: torch.Tensor, new: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        parts = [w * r.totals(prompt, new, lengths) for r, w in self.parts if w]
        return torch.stack(parts).sum(0) if parts else torch.zeros(len(new), dtype=torch.float64)


class _CombinedState(RewardState):
    def __init__(self, parts: list[tuple[RewardState, float]]) -> None:
        self.parts = parts

    def see(self, hidden: torch.Tensor) -> None:
        for state, _ in self.parts:
            state.see(hidden)

    def candidates(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        # A part of weight 0 is not asked: 0 times -inf is no number.
        rewards = [weight * state.candidates(ids) for state, weight in self.parts if weight]
        if not rewards:
            return 0.0 * self.parts[0][0].candidates(ids)
        # Rewards by id may know fewer ids than the model has; the others earn 0.
        widest = max(part.shape[-1] for part in rewards)
        rewards = [F.pad(part, (0, widest - part.shape[-1])) for part in rewards]
        return functools.reduce(torch.add, rewards)

    def advance(self, tokens: torch.Tensor) -> None:
        for state, _ in self.parts:
            state.advance(tokens)

    def select(self, rows: torch.Tensor) -> None:
        for state, _ in self.parts:
            state.select(rows)


class CombinedTextReward(TextRewardFunction):
    """A weighted sum of text rewards; see `combine`."""

    def __init__(self, parts: Sequence[tuple[TextReward, float]]) -> None:
        self.parts = [(reward, float(weight)) for reward, weight in parts]
        self.__name__ = " + ".join(f"{weight:g} {name_of(r)}" for r, weight in self.parts)

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[str] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        given = completions if completions is not None else completion_ids
        count = len(value_of(given, "completions", self))
        total = torch.zeros(count, dtype=torch.float64)
        for reward, weight in self.parts:
            values = reward(
                prompts=prompts, completions=completions, completion_ids=completion_ids, **columns
            )
            try:
                total += weight * _numbers(values, count)
            except ValueError as error:
                raise RewardError(f"the reward {name_of(reward)!r}: {error}") from None
        return total.tolist()


def combine(parts: Sequence[tuple[Any, float]]) -> "CombinedReward | CombinedTextReward":
    """The weighted sum of several rewards, all of decoding or all of texts.

    Args:
        parts: (reward, weight) pairs: `Reward`s, or functions in TRL's signature. Turn the latter
            into the former with `text_reward_fn` where both are wanted.
    Returns: a reward of the same sort.
    Raises: ValueError for no part, a weight that is not finite, or a mixture of both sorts.
    """
    pairs = list(parts)
    if not pairs:
        raise ValueError("there are no rewards to combine")
    for reward, weight in pairs:
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name_of(reward)} must be finite, not {weight}")
    of_decoding = [isinstance(reward, Reward) for reward, _ in pairs]
    if all(of_decoding):
        return CombinedReward(pairs)
    if any(of_decoding):
        odd = name_of(pairs[of_decoding.index(False)][0])
        raise ValueError(
            f"{odd} is not a Reward of decoding as the others are: wrap it with text_reward_fn "
            f"(texts) or ids_reward_fn (ids)"
        )
    return CombinedTextReward(pairs)
