"""What a model thinks of records: surprisal, typicality, and any field given any others.

Surprisal is in bits. The bits of a field are those of its value and terminator, given the fields
before it; they sum to the bits of the record given the order of its fields (chain rule). Typicality
is the surprisal beside what the model itself expected at every step,

    z = (sum_t s_t - sum_t H_t) / sqrt(sum_t V_t),    s_t = -log p(x_t),

H_t and V_t the entropy and varentropy of the model's distribution there. The terms s_t - H_t are
martingale differences, so that under the model z has mean 0 and variance 1 at every length.
Source: Bao et al. 2024, Fast-DetectGPT (arXiv:2310.05130), whose analytic discrepancy is -z.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanogpt.explore.learning import NAME, Encoded, Encoder, Sequences, random_orders
from nanogpt.model import GPT
from nanogpt.records import micro_batches

_AT_ONCE_TOKENS = 16_384
_LOGIT_BYTES = 64 * 2**20
Progress = Callable[[int], None]


def _nothing(tokens: int) -> None:
    pass


@dataclass(frozen=True)
class TokenScores:
    """Of each position, in nats.

    Attributes:
        surprisal, entropy, varentropy: float64, of one shape.
    """

    surprisal: torch.Tensor
    entropy: torch.Tensor
    varentropy: torch.Tensor


def token_scores(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    """Surprisal of targets, and the entropy and varentropy of the distributions they come from.

    Args:
        logits: (N, V); -inf for what cannot come, which contributes nothing (0 log 0 = 0).
        targets: (N,) int64.
    Returns: (N,) each, float64.
    """
    log_p = F.log_softmax(logits.double(), dim=-1)
    p = log_p.exp()
    finite = log_p.masked_fill(p == 0, 0.0)
    entropy = -(p * finite).sum(dim=-1)
    varentropy = (p * (finite + entropy[:, None]) ** 2).sum(dim=-1)
    surprisal = -log_p.gather(1, targets[:, None]).squeeze(1)
    return TokenScores(surprisal, entropy, varentropy)


def typicality(surprisal: np.ndarray, entropy: np.ndarray, varentropy: np.ndarray) -> np.ndarray:
    """z of sums over a record's tokens, in any one unit (varentropy in its square).

    0 where the model was sure of everything and right; inf where it was sure and wrong.
    """
    difference = surprisal - entropy
    spread = np.sqrt(varentropy)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = difference / spread
    return np.where(spread > 1e-12, z, np.where(difference > 1e-9, np.inf, 0.0))


@torch.inference_mode()
def sequence_surprisal(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Bits of token sequences, each conditioned on its first token alone.

    Args:
        tokens: (B, T + 1) int64; what follows a second end-of-text token does not count. Without a
            tokenizer the last id is that token.
    Returns: (B,) float64, the end-of-text token that ends a sequence included.
    """
    end = model.config.vocab_size - 1
    logits, _ = model(tokens[:, :-1])
    targets = tokens[:, 1:]
    log_p = F.log_softmax(logits.double(), dim=-1)
    s = -log_p.gather(2, targets[:, :, None]).squeeze(2)  # (B, T)
    ended = (targets == end).cumsum(dim=1) - (targets == end).long() > 0
    return s.masked_fill(ended, 0.0).sum(dim=1) / math.log(2)


@dataclass(frozen=True)
class Surprisal:
    """What a model thinks of records, in bits.

    Attributes:
        bits: (n,) of each record, given its fields' order, averaged over orders.
        field_bits: (n, F), whose sum over the fields is `bits`.
        z: (n,) typicality, averaged over orders.
        expected_bits: (n, F) what the model expected of each field there.
    """

    bits: np.ndarray
    field_bits: np.ndarray
    z: np.ndarray
    expected_bits: np.ndarray


class Scorer:
    """A model and the encoder of its records.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: GPT, encoder: Encoder) -> None:
        self.model, self.encoder = model, encoder
        self.device = model.token_weight.device
        # For each field the tokens that its value can begin with; a text's are all tokens.
        self.mask = torch.zeros(encoder.n_fields + 1, model.config.vocab_size)
        for place, ids in enumerate(encoder.class_ids):
            if len(ids):
                self.mask[place] = -math.inf
                self.mask[place, torch.from_numpy(ids)] = 0.0
        self.mask = self.mask.to(self.device)

    def _parts(self, batch: Sequences) -> Iterator[tuple[np.ndarray, int]]:
        lengths = np.maximum(1, (batch.cells > -2).sum(axis=1))
        for part in micro_batches(lengths, _AT_ONCE_TOKENS):
            yield part, int(lengths[part].max())

    @torch.inference_mode()
    def surprisal(
        self,
        encoded: Encoded,
        *,
        n_orders: int,
        seed: tuple[int, ...],
        progress: Progress = _nothing,
    ) -> Surprisal:
        """Records scored in `n_orders` orders of their fields each, drawn with the seed."""
        n, n_fields = len(encoded), self.encoder.n_fields
        bits, expected, z = np.zeros((n, n_fields)), np.zeros((n, n_fields)), np.zeros(n)
        for number in range(n_orders):
            rng = np.random.default_rng((*seed, number))
            orders = random_orders(rng, n, n_fields)
            for rows in np.array_split(np.arange(n), max(1, n // 1024)):
                s, h, v = self.cell_scores(encoded, rows, orders[rows], progress)
                bits[rows] += s
                expected[rows] += h
                z[rows] += typicality(s.sum(axis=1), h.sum(axis=1), v.sum(axis=1))
        bits, expected = bits / n_orders, expected / n_orders
        return Surprisal(bits.sum(axis=1), bits, z / n_orders, expected)

    @torch.inference_mode()
    def cell_scores(
        self, encoded: Encoded, rows: np.ndarray, orders: np.ndarray, progress: Progress = _nothing
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, F) surprisal and entropy in bits and varentropy in bits squared of each cell."""
        batch = encoded.sequences(rows, orders, self.model.config.block_size)
        out = np.zeros((3, len(rows), self.encoder.n_fields))
        for part, width in self._parts(batch):
            tokens = torch.from_numpy(batch.tokens[part, :width]).to(self.device)
            cells = torch.from_numpy(batch.cells[part, :width]).to(self.device)
            keep = cells >= 0
            hidden = self.model.hidden_states(tokens)[keep]  # (N, C)
            targets = torch.from_numpy(batch.targets[part, :width]).to(self.device)[keep]
            of = cells[keep]
            records = torch.from_numpy(batch.records[part]).to(self.device)
            flat = (records[:, None].expand_as(cells)[keep] * self.encoder.n_fields + of).cpu()
            per = max(1, _LOGIT_BYTES // (8 * self.model.config.vocab_size))
            for first in range(0, len(of), per):
                some = slice(first, first + per)
                logits = F.linear(hidden[some], self.model.token_weight) + self.mask[of[some]]
                scores = token_scores(logits, targets[some])
                values = (scores.surprisal, scores.entropy, scores.varentropy)
                for into, value in zip(out, values, strict=True):
                    np.add.at(into.reshape(-1), flat[some].numpy(), value.cpu().numpy())
            progress(tokens.numel())
        nats = math.log(2)
        return out[0] / nats, out[1] / nats, out[2] / nats**2

    @torch.inference_mode()
    def distribution(
        self,
        encoded: Encoded,
        rows: np.ndarray,
        orders: np.ndarray,
        target: int,
        progress: Progress = _nothing,
    ) -> np.ndarray:
        """P(class of a field | other fields), the fields of `orders` in their order.

        Args:
            rows: (B,) records. orders: (B, f), without the target; f may be 0.
            target: a coded field.
        Returns: (B, K) float64, rows that sum to 1.
        """
        ids = torch.from_numpy(self.encoder.class_ids[target]).to(self.device)
        weight = self.model.token_weight[ids]  # (K, C)
        name = int(self.encoder.name_ids[target])
        out = np.empty((len(rows), len(ids)))
        at_once = max(1, _AT_ONCE_TOKENS // (2 * orders.shape[1] + 2))
        for first in range(0, len(rows), at_once):
            some = slice(first, first + at_once)
            prefix, lengths = self._prefix(encoded, rows[some], orders[some], name)
            tokens = torch.from_numpy(prefix).to(self.device)
            hidden = self.model.hidden_states(tokens)
            last = hidden[torch.arange(len(tokens)), torch.from_numpy(lengths - 1)]  # (B, C)
            logits = F.linear(last, weight).double()
            out[some] = torch.softmax(logits, dim=-1).cpu().numpy()
            progress(tokens.numel())
        return out

    def _prefix(
        self, encoded: Encoded, rows: np.ndarray, orders: np.ndarray, name: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(B, T) tokens up to and with the target's name, and their lengths.

        A text that is too long for the context loses its beginning.
        """
        block = self.model.config.block_size
        encoder = self.encoder
        texts = encoded.texts
        if not (texts and np.isin(orders, list(texts)).any()):
            width = orders.shape[1]
            tokens = np.full((len(rows), 2 * width + 2), encoder.end, np.int64)
            tokens[:, 1:-1:2] = encoder.name_ids[orders]
            tokens[:, 2:-1:2] = encoded.ids[rows[:, None], orders]
            tokens[:, -1] = name
            tokens = tokens[:, -block:]
            return tokens, np.full(len(rows), tokens.shape[1])
        parts = []
        for row, order in zip(rows.tolist(), orders.tolist(), strict=True):
            pieces = [np.array([encoder.end])]
            room = max(1, (block - 2 - 2 * len(order)) // max(1, sum(f in texts for f in order)))
            for field in order:
                value = texts[field][row] if field in texts else encoded.ids[row, field, None]
                pieces += [encoder.name_ids[field, None], value[-room:]]
            pieces.append(np.array([name]))
            parts.append(np.concatenate(pieces)[-block:])
        lengths = np.array([len(part) for part in parts])
        tokens = np.zeros((len(parts), int(lengths.max())), np.int64)
        for row, part in enumerate(parts):
            tokens[row, : len(part)] = part
        return tokens, lengths

    def given_rest(
        self,
        encoded: Encoded,
        target: int,
        *,
        n_orders: int,
        seed: tuple[int, ...],
        progress: Progress = _nothing,
    ) -> np.ndarray:
        """(n, K) P(class of a field | all others), the mean over orders of the others."""
        n, n_fields = len(encoded), self.encoder.n_fields
        others = np.array([place for place in range(n_fields) if place != target], np.int64)
        total = np.zeros((n, len(self.encoder.class_ids[target])))
        for number in range(n_orders):
            rng = np.random.default_rng((*seed, target, number))
            orders = others[random_orders(rng, n, len(others))]
            total += self.distribution(encoded, np.arange(n), orders, target, progress)
        return total / n_orders

    def marginal(self, target: int) -> np.ndarray:
        """(K,) P(class of a field), nothing given."""
        one = Encoded(
            self.encoder,
            np.zeros((1, self.encoder.n_fields), np.int32),
            np.zeros((1, self.encoder.n_fields), np.int32),
            {},
        )
        return self.distribution(one, np.zeros(1, np.int64), np.zeros((1, 0), np.int64), target)[0]

    def pair_tables(self, progress: Progress = _nothing) -> dict[tuple[int, int], np.ndarray]:
        """P(class of b | class of a) of all pairs of coded fields, (K_a, K_b) each."""
        coded = [place for place, ids in enumerate(self.encoder.class_ids) if len(ids)]
        found = {}
        for a in coded:
            ids = self.encoder.class_ids[a]
            one = np.zeros((len(ids), self.encoder.n_fields), np.int32)
            one[:, a] = ids
            encoded = Encoded(self.encoder, one, one, {})
            rows, orders = np.arange(len(ids)), np.full((len(ids), 1), a)
            for b in coded:
                if a != b:
                    found[a, b] = self.distribution(encoded, rows, orders, b, progress)
        return found

    @torch.inference_mode()
    def states(
        self,
        encoded: Encoded,
        *,
        n_orders: int = 1,
        seed: tuple[int, ...] = (0,),
        progress: Progress = _nothing,
    ) -> np.ndarray:
        """(n, C) float64: a vector for each record, not centred.

        The mean of the states at its tokens, later ones weighing more, as they know more of the
        record; averaged over orders.
        """
        total = np.zeros((len(encoded), self.model.config.n_embd))
        for number in range(n_orders):
            rng = np.random.default_rng((*seed, number))
            orders = random_orders(rng, len(encoded), self.encoder.n_fields)
            total += self.states_of(encoded, orders, progress)
        return total / n_orders

    @torch.inference_mode()
    def states_of(
        self, encoded: Encoded, orders: np.ndarray, progress: Progress = _nothing
    ) -> np.ndarray:
        """(n, C) float64: the same in given orders, (n, f) or (f,) for all records."""
        n = len(encoded)
        orders = np.broadcast_to(orders, (n, orders.shape[-1]))
        out = np.zeros((n, self.model.config.n_embd))
        for rows in np.array_split(np.arange(n), max(1, n // 1024)):
            batch = encoded.sequences(rows, orders[rows], self.model.config.block_size)
            weight = position_weights(batch)
            for part, width in self._parts(batch):
                tokens = torch.from_numpy(batch.tokens[part, :width]).to(self.device)
                hidden = self.model.hidden_states(tokens).double()
                w = torch.from_numpy(weight[part, :width]).to(self.device)
                pooled = (hidden * w[:, :, None]).sum(dim=1).cpu().numpy()
                np.add.at(out, rows[batch.records[part]], pooled)
                progress(tokens.numel())
        return out


def position_weights(batch: Sequences) -> np.ndarray:
    """(B, T) weights of positions, proportional to 1, 2, … n over a record's tokens, that sum to 1.

    Source: Muennighoff 2022, SGPT (arXiv:2202.08904).
    """
    real = batch.cells > -2
    lengths = real.sum(axis=1)
    n_records = int(batch.records.max(initial=-1)) + 1
    order = np.argsort(batch.records, kind="stable")
    before = np.zeros(len(lengths), np.int64)
    total = np.zeros(n_records, np.int64)
    for window in order.tolist():  # windows of one record follow each other
        record = batch.records[window]
        before[window] = total[record]
        total[record] += lengths[window]
    place = before[:, None] + np.cumsum(real, axis=1)
    n = total[batch.records][:, None]
    return np.where(real, place / (n * (n + 1) / 2), 0.0)


def centred(states: np.ndarray, n_components: int = 1) -> np.ndarray:
    """(n, C) unit vectors: without their mean and the directions in which all of them vary most.

    Source: Mu and Viswanath 2018, All-but-the-top (arXiv:1702.01417).
    """
    x = states - states.mean(axis=0)
    if n_components and len(x) > n_components:
        _, _, directions = np.linalg.svd(x, full_matrices=False)
        top = directions[:n_components]
        x = x - x @ top.T @ top
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm > 1e-12, norm, 1.0)


def joint_rescoring(log_probabilities: Sequence[float] | np.ndarray) -> np.ndarray:
    """P(v | the rest) by Bayes: softmax over v of log p(record with v in its place).

    Args:
        log_probabilities: (K,) or (K, R) nats, R orders of the fields, averaged as a mixture.
    Returns: (K,) float64 that sum to 1.
    """
    table = torch.as_tensor(np.asarray(log_probabilities, np.float64))
    if table.dim() == 2:
        table = torch.logsumexp(table, dim=1) - math.log(table.shape[1])
    return torch.softmax(table, dim=0).numpy()


__all__ = [
    "NAME",
    "Scorer",
    "Surprisal",
    "TokenScores",
    "centred",
    "joint_rescoring",
    "position_weights",
    "sequence_surprisal",
    "token_scores",
    "typicality",
]
