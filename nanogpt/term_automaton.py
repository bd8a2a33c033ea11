"""Terms in a text that is written token by token: an automaton over a vocabulary.

What a term is, and what the progress towards one is worth, stands at `term_reward_fn` in
`rewards.py`. Characters are folded one by one; a token may begin or end inside one.
"""

import codecs
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from nanogpt.tokenizer import Tokenizer

# The state of a term match that is under way is a node of the trie of the terms, or one of these.
_ROOT = 0  # after a boundary, on the way to no term
_IN_WORD = -1  # after a letter, on the way to no term
# Characters that no term holds: the end of a text, any other letter, anything else.
_END, _OTHER_LETTER, _OTHER = "end", "letter", "other"
_REPLACEMENT = "\ufffd"
_WORD = re.compile(r"\w")
_MOST_KEPT = 256


def _is_word(character: str) -> bool:
    if len(character) > 1:
        return character == _OTHER_LETTER
    return _WORD.match(character) is not None


def fold(text: str) -> str:
    """Case folding of those characters that fold to one ("ß" stays)."""
    return "".join(c.casefold() if len(c.casefold()) == 1 else c for c in text)


class _Matcher:
    """(?<!\\w)(?:t1|t2|…)(?!\\w), longer terms first, as an automaton over folded characters.

    For each node of the trie it knows what happens where the text turns away from it: the terms
    that are then certain, and the state that is left.
    """

    def __init__(self, terms: Iterable[str]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.parent, self.depth, self.character = [_ROOT], [0], [""]
        self.term: list[int | None] = [None]
        self.terms: list[str] = []
        for term in terms:
            node = _ROOT
            for character in term:
                if character not in self.children[node]:
                    self.children[node][character] = len(self.children)
                    self.children.append({})
                    self.parent.append(node)
                    self.depth.append(self.depth[node] + 1)
                    self.character.append(character)
                    self.term.append(None)
                node = self.children[node][character]
            if self.term[node] is None:
                self.term[node] = len(self.terms)
                self.terms.append(term)
        count = len(self.children)
        self.left = [_ROOT] * count
        self.matches: list[tuple[int, ...]] = [()] * count
        self.by_depth = sorted(range(1, count), key=lambda node: self.depth[node])
        # What is left of a node is shorter than the node, so its own turning away is known.
        for node in self.by_depth:
            self._learn_turning_away(node)
        self._potentials: OrderedDict[int, list[float]] = OrderedDict()

    def _learn_turning_away(self, node: int) -> None:
        path = []
        at = node
        while at != _ROOT:
            path.append(at)
            at = self.parent[at]
        path.reverse()
        text = [self.character[at] for at in path]
        # The longest term inside that a boundary follows; without one the first character goes.
        used, found = 1, []
        for length in range(1, len(text)):
            term = self.term[path[length - 1]]
            if term is not None and not _is_word(text[length]):
                used, found = length, [term]
        state = _IN_WORD if _is_word(text[used - 1]) else _ROOT
        for character in text[used:]:
            state = self.feed(state, character, found)
        self.matches[node], self.left[node] = tuple(found), state

    def feed(self, state: int, character: str, found: list[int]) -> int:
        """The state after a folded character; terms that are now certain go to `found`."""
        while state != _IN_WORD:
            child = self.children[state].get(character)
            if child is not None:
                return child
            if state == _ROOT:
                break
            state = self._turn_away(state, _is_word(character), found)
        return _IN_WORD if _is_word(character) else _ROOT

    def abandon(self, state: int, before_letter: bool, found: list[int]) -> int:
        """Turn away until the text is on the way to nothing: `_ROOT` or `_IN_WORD`."""
        while state > _ROOT:
            state = self._turn_away(state, before_letter, found)
        return state

    def _turn_away(self, state: int, before_letter: bool, found: list[int]) -> int:
        term = self.term[state]
        if term is not None and not before_letter:
            found.append(term)
            return _IN_WORD if _is_word(self.character[state]) else _ROOT
        found.extend(self.matches[state])
        return self.left[state]

    def ways_on(self, state: int) -> set[str]:
        """Characters with which some match under way goes on."""
        characters: set[str] = set()
        while state > _ROOT:
            characters.update(self.children[state])
            state = self.left[state]
        return characters

    def potentials(self, counted: int) -> list[float]:
        """What each node is worth while the terms of the bit set `counted` are counted already."""
        if counted in self._potentials:
            self._potentials.move_to_end(counted)
            return self._potentials[counted]
        shortest = [math.inf] * len(self.children)  # uncounted term at or below each node
        for node in reversed(self.by_depth):
            term = self.term[node]
            if term is not None and not counted >> term & 1:
                shortest[node] = self.depth[node]
            above = self.parent[node]
            shortest[above] = min(shortest[above], shortest[node])
        potential = [0.0] * len(self.children)
        for node in self.by_depth:
            certain = potential[self.left[node]] if self.left[node] > _ROOT else 0.0
            certain += sum(not counted >> term & 1 for term in set(self.matches[node]))
            potential[node] = max(self.depth[node] / (shortest[node] + 1), certain)
        self._potentials[counted] = potential
        if len(self._potentials) > _MOST_KEPT:
            self._potentials.popitem(last=False)
        return potential


class TermAutomaton:
    """The matcher over a vocabulary: every token as folded characters, and which of them matter."""

    def __init__(self, terms: Sequence[str], tokenizer: Tokenizer) -> None:
        self.matcher = _Matcher(terms)
        self.pieces = tokenizer.token_bytes
        self.texts = []  # whole characters of every token on its own, folded
        for raw in self.pieces:
            text, _ = _decode(b"", raw)
            self.texts.append(fold(text))
        self._characters = set("".join(self.texts))
        # By first character: tokens, and a representative that leads nowhere for the rest.
        self.starting_with: dict[str, list[int]] = {}
        self.of_kind: dict[str, torch.Tensor] = {}
        kinds: dict[str, list[int]] = {_OTHER_LETTER: [], _OTHER: [], _END: [], "": []}
        for token, (text, raw) in enumerate(zip(self.texts, self.pieces, strict=True)):
            if text:
                self.starting_with.setdefault(text[0], []).append(token)
                kinds[_OTHER_LETTER if _is_word(text[0]) else _OTHER].append(token)
            else:
                kinds["" if raw else _END].append(token)
        self.of_kind = {kind: torch.tensor(ids, dtype=torch.int64) for kind, ids in kinds.items()}
        # Tokens that can only go on with an unfinished character.
        self.continuing = [i for i, raw in enumerate(self.pieces) if raw and raw[0] & 0xC0 == 0x80]
        # Tokens that lead somewhere from a state on the way to nothing: the only ones that matter
        # there, and wherever their first character goes on with no match.
        self.sprouts: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
        for start in (_ROOT, _IN_WORD):
            self.sprouts[start] = []
            for token, text in enumerate(self.texts):
                found: list[int] = []
                end = self.walk(start, text, found)
                if end > _ROOT or found:
                    self.sprouts[start].append((token, end, tuple(found)))
        self._kept: OrderedDict[tuple[int, bytes, int], torch.Tensor] = OrderedDict()
        self._most_kept = max(8, min(_MOST_KEPT, 2**22 // len(self.pieces)))

    def writes(self, character: str) -> bool:
        """Whether tokens can write a character that folds to this one, whole or byte by byte."""
        if character in self._characters:
            return True
        forms = {character, character.upper(), character.swapcase()}
        return any(self._spells(form.encode()) for form in forms if len(form) == 1)

    def _spells(self, raw: bytes) -> bool:
        """Whether the end of a token, then whole tokens, then the beginning of one make `raw`."""
        size = len(raw)
        reached = {i for i in range(1, size) if any(p.endswith(raw[:i]) for p in self.pieces)}
        for i in range(1, size):
            if i in reached:
                if any(p.startswith(raw[i:]) for p in self.pieces):
                    return True
                reached |= {j for j in range(i + 1, size) if raw[i:j] in self.pieces}
        return False

    def walk(self, state: int, text: str, found: list[int]) -> int:
        for character in text:
            state = self.matcher.feed(state, character, found)
        return state

    def worth(self, end: int, found: Iterable[int], counted: int) -> float:
        """The potential at `end` with the terms in `found` on the way."""
        fresh = 0
        for term in found:
            fresh |= 1 << term
        fresh &= ~counted
        more = self.matcher.potentials(counted | fresh)[end] if end > _ROOT else 0.0
        return fresh.bit_count() + more

    def rewards(self, state: int, held: bytes, counted: int) -> torch.Tensor:
        """(V,) float64 from a state, an unfinished character, and the terms that are counted."""
        key = (state, held, counted)
        if key not in self._kept:
            self._kept[key] = self._compute(state, held, counted)
            if len(self._kept) > self._most_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _compute(self, state: int, held: bytes, counted: int) -> torch.Tensor:
        before = self.worth(state, (), counted)
        if not held:
            return self._from_whole_character(state, [], counted) - before
        # Whatever does not go on with the unfinished character makes U+FFFD of it.
        found: list[int] = []
        turned = self.matcher.feed(state, _REPLACEMENT, found)
        rewards = self._from_whole_character(turned, found, counted)
        for token in self.continuing:
            on_the_way: list[int] = []
            text, _ = _decode(held, self.pieces[token])
            end = self.walk(state, fold(text), on_the_way)
            rewards[token] = self.worth(end, on_the_way, counted)
        return rewards - before

    def _from_whole_character(self, state: int, found: list[int], counted: int) -> torch.Tensor:
        rewards = torch.zeros(len(self.pieces), dtype=torch.float64)
        for kind, ids in self.of_kind.items():
            on_the_way = list(found)
            end = self.matcher.feed(state, kind, on_the_way) if kind else state
            rewards[ids] = self.worth(end, on_the_way, counted)
        # Wherever the first character goes on with no match, the text is on its own from there.
        goes_on = self.matcher.ways_on(state)
        for before_letter in (True, False):
            on_the_way = list(found)
            start = self.matcher.abandon(state, before_letter, on_the_way)
            for token, end, of_token in self.sprouts[start]:
                first = self.texts[token][0]
                if _is_word(first) is before_letter and first not in goes_on:
                    rewards[token] = self.worth(end, [*on_the_way, *of_token], counted)
        for character in goes_on:
            for token in self.starting_with.get(character, ()):
                on_the_way = list(found)
                end = self.walk(state, self.texts[token], on_the_way)
                rewards[token] = self.worth(end, on_the_way, counted)
        return rewards


class TermRow:
    """The automaton's place in one text."""

    def __init__(self, automaton: TermAutomaton) -> None:
        self.automaton = automaton
        self.state, self.held, self.counted = _ROOT, b"", 0

    def candidates(self) -> torch.Tensor:
        return self.automaton.rewards(self.state, self.held, self.counted)

    def advance(self, token: int) -> float:
        """Go on with a token; gives its reward."""
        automaton, found = self.automaton, list[int]()
        before = automaton.worth(self.state, (), self.counted)
        raw = automaton.pieces[token]
        if raw:
            text, self.held = _decode(self.held, raw)
            self.state = automaton.walk(self.state, fold(text), found)
        else:
            if self.held:
                self.state = automaton.matcher.feed(self.state, _REPLACEMENT, found)
            self.held = b""
            self.state = automaton.matcher.feed(self.state, _END, found)
        after = automaton.worth(self.state, found, self.counted)
        for term in found:
            self.counted |= 1 << term
        return after - before

    def copy(self) -> "TermRow":
        twin = TermRow(self.automaton)
        twin.state, twin.held, twin.counted = self.state, self.held, self.counted
        return twin


def _decode(held: bytes, raw: bytes) -> tuple[str, bytes]:
    """Whole characters of held + raw, U+FFFD for what is none, and the unfinished rest."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(held + raw)
    return text, decoder.getstate()[0]
