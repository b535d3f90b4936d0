"""What was read and what was left out, by kind, with the first places of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fusiontree.data.records import BLANK_LINE, BadRecord
from fusiontree.errors import InputError

MAX_EXAMPLES = 5


@dataclass
class Skipped:
    """Records left out for one reason: how many, and the first of them as `file:line: what was found`."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


def refusal(source: str, bad: BadRecord) -> InputError:
    """What `on_bad_record: error` says of a record; `source` is its `file:line`."""
    return InputError(f"{source}: {bad.kind}, {bad.detail} (data.on_bad_record: skip leaves such records out)")


@dataclass
class DataReport:
    """Counts of one pass over the data, or of several in which each bad record counts once.

    Attributes:
        documents: documents read, repetitions in later epochs included.
        blank_lines: lines with nothing on them, which are no records and no fault.
        skipped: by kind of fault (see `fusiontree.data.records`).
        tokens: tokens of documents in the rows handed out; padding_tokens: what else is in them.
        cut_documents: documents in them that did not fit the rest of a row and were cut, repetitions included.
    """

    documents: int = 0
    blank_lines: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict)
    tokens: int = 0
    padding_tokens: int = 0
    cut_documents: int = 0

    @property
    def padding_share(self) -> float:
        """Padding among all tokens of the rows handed out; 0 before the first."""
        return self.padding_tokens / max(1, self.tokens + self.padding_tokens)

    @property
    def total_skipped(self) -> int:
        return sum(skipped.count for skipped in self.skipped.values())

    def add(self, source: str, bad: BadRecord) -> None:
        """Count a line that gave no text; `source` is its `file:line`."""
        if bad.kind == BLANK_LINE:
            self.blank_lines += 1
            return
        skipped = self.skipped.setdefault(bad.kind, Skipped())
        skipped.count += 1
        if len(skipped.examples) < MAX_EXAMPLES:
            skipped.examples.append(f"{source}: {bad.detail}")

    def reasons(self) -> str:
        """`2 broken JSON, 1 empty text`, most frequent first; empty when nothing was skipped."""
        ordered = sorted(self.skipped.items(), key=lambda item: (-item[1].count, item[0]))
        return ", ".join(f"{skipped.count} {kind}" for kind, skipped in ordered)

    def summary(self) -> str:
        """One line for a log: what was read, how it was packed, what was skipped and where it first happened."""
        documents = f"{self.documents} document" + ("" if self.documents == 1 else "s") + " read"
        if self.tokens:
            documents += f" ({self.cut_documents} cut, {self.padding_share:.1%} padding)"
        if not self.skipped:
            return f"{documents}, no record skipped"
        first = "; ".join(f"{kind} first at {skipped.examples[0]}" for kind, skipped in sorted(self.skipped.items()))
        records = f"{self.total_skipped} record" + ("" if self.total_skipped == 1 else "s")
        return f"{documents}, {records} skipped: {self.reasons()} ({first})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "blank_lines": self.blank_lines,
            "skipped": {kind: [entry.count, list(entry.examples)] for kind, entry in self.skipped.items()},
            "tokens": self.tokens,
            "padding_tokens": self.padding_tokens,
            "cut_documents": self.cut_documents,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> DataReport:
        """What `state_dict` gave; one without counts of tokens, as the first version had it, counts them from 0."""
        skipped = {kind: Skipped(count, list(examples)) for kind, (count, examples) in state["skipped"].items()}
        packed = {name: state.get(name, 0) for name in ("tokens", "padding_tokens", "cut_documents")}
        return cls(state["documents"], state["blank_lines"], skipped, **packed)
