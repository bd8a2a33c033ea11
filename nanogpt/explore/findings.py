"""What a finding is, in numbers and in a sentence."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One true thing about the records.

    Attributes:
        kind: constant | id | duplicate_fields | leak | dependency | joint_dependency | unusual |
            duplicates | near_duplicates | group | drift.
        fields: the fields it is about.
        rows: 0-based numbers of the records it is about; empty where it is about all of them.
        effect: how large it is, in `unit`.
        q: the false discovery rate at which it is found, over everything tried; None for a plain
            fact, which nothing was tested for.
        n: records that it rests on.
        sentence: the same in plain words.
        evidence_bits: how much less surprising the records are to whoever knows it, in bits over
            all of them; what orders findings.
        details: JSON-ready: examples, expected values, terms, direction.
    """

    kind: str
    fields: tuple[str, ...]
    rows: tuple[int, ...]
    effect: float
    unit: str
    q: float | None
    n: int
    sentence: str
    evidence_bits: float
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "kind": self.kind,
            "fields": list(self.fields),
            "rows": list(self.rows),
            "effect": self.effect,
            "unit": self.unit,
            "q": self.q,
            "n": self.n,
            "sentence": self.sentence,
            "evidence_bits": self.evidence_bits,
            "details": self.details,
        }
