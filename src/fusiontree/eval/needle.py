"""Passkey retrieval (Mohtashami and Jaggi 2023, "Landmark Attention"): somewhere in filler a marker is followed by a
passkey of several tokens; at the row's end the marker stands again, and the passkey has to follow.

Ids alone, no text: the filler is drawn at random or cut from a text of ids. Shapes: B rows, T tokens, n passkey tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fusiontree.data.batch import IGNORED_LABEL, Batch
from fusiontree.errors import InputError


@dataclass(frozen=True, kw_only=True)
class PasskeyTask:
    """The sizes of the task.

    length: tokens T in a row, question and answer included.
    depth: where the passkey stands, from 0 (at the row's start) to 1 (right before the question); None draws it anew
        for every row.
    digits: tokens n of the passkey.
    marker: ids that stand before the passkey, and again before the answer.
    alphabet: ids that a passkey is drawn from, and random filler too, so that only the marker tells them apart.

    Raises:
        InputError: marker, passkey, question and answer do not fit into a row; a depth outside 0 to 1; fewer than two
            ids to draw from, or the marker among them.
    """

    length: int
    depth: float | None = None
    digits: int = 4
    marker: tuple[int, ...] = (0,)
    alphabet: Sequence[int] = range(1, 64)

    def __post_init__(self) -> None:
        if self.digits < 1 or not self.marker:
            raise InputError(
                f"a passkey needs at least one token and one of marker, got `digits` {self.digits} and `marker` "
                f"{list(self.marker)}"
            )
        if self.length < 2 * self.needle:
            raise InputError(
                f"a row of {self.length} tokens is too short for a marker of {len(self.marker)} and a passkey of "
                f"{self.digits} tokens, each there twice: make it at least {2 * self.needle}"
            )
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise InputError(f"`depth` must lie between 0 (the row's start) and 1 (its end), got {self.depth}")
        if len(set(self.alphabet)) < 2 or set(self.marker) & set(self.alphabet):
            raise InputError(
                f"`alphabet` must hold at least two ids and none of the marker {list(self.marker)}, got "
                f"{len(set(self.alphabet))} ids"
            )

    @property
    def needle(self) -> int:
        """Tokens of marker and passkey together."""
        return len(self.marker) + self.digits

    def batch(self, rows: Iterable[int], *, seed: int, filler: torch.Tensor | None = None) -> Batch:
        """The rows of these numbers; a row follows from its number and the seed, whatever stands beside it.

        Rows of one number and seed hold the same passkey at every depth and length. Labels are unshifted and count at
        the answer's n tokens alone.

        Args:
            rows: numbers of the rows.
            seed: of all rows.
            filler: ids of a text [S], of which each row takes a stretch from a place of its own, from the start again
                at its end; None draws ids of `alphabet`.

        Raises:
            InputError: `filler` is empty or holds the marker.
        """
        text = None if filler is None else self._checked(filler)
        input_ids = torch.from_numpy(np.stack([self._row(row, seed, text) for row in rows]))
        labels = torch.full_like(input_ids, IGNORED_LABEL)
        labels[:, -self.digits :] = input_ids[:, -self.digits :]
        return Batch(input_ids, labels, torch.arange(self.length).expand(len(input_ids), -1).contiguous())

    def _row(self, row: int, seed: int, text: np.ndarray | None) -> np.ndarray:
        draw = np.random.default_rng((seed, row))
        alphabet = np.asarray(self.alphabet, dtype=np.int64)
        needle = np.concatenate((self.marker, draw.choice(alphabet, self.digits))).astype(np.int64)
        depth = draw.random()  # drawn even where it is given, so that the passkey's row does not depend on that
        room = self.length - 2 * self.needle
        if text is None:
            hay = draw.choice(alphabet, room)
        else:
            hay = np.take(text, draw.integers(len(text)) + np.arange(room), mode="wrap")
        place = round((depth if self.depth is None else self.depth) * room)
        return np.concatenate((hay[:place], needle, hay[place:], needle))

    def _checked(self, filler: torch.Tensor) -> np.ndarray:
        text = filler.cpu().numpy().astype(np.int64)
        size = len(self.marker)
        # A row wraps around the text's end, where the marker could arise too.
        joined = np.concatenate((text, text[: size - 1]))
        if len(text) < size or (np.lib.stride_tricks.sliding_window_view(joined, size) == self.marker).all(1).any():
            raise InputError(
                f"the filler text of {len(text)} ids is too short or holds the marker {list(self.marker)}: choose a "
                "marker that it does not hold"
            )
        return text


@torch.no_grad()
def passkey_accuracy(
    logits: Callable[[Batch], torch.Tensor],
    task: PasskeyTask,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    rows: int,
    seed: int,
    filler: torch.Tensor | None = None,
    at_once: int = 8,
) -> list[list[float]]:
    """Share of the passkeys of which every token is the likeliest next one, as greedy decoding would have to find them.

    Args:
        logits: rows -> [B, T, V]; the logits of column t are for token t + 1.
        task: its `length` and `depth` give way to those of the grid.
        lengths, depths: the grid.
        rows: passkeys asked for in each cell, `at_once` together.
        seed, filler: as of `PasskeyTask.batch`.

    Returns:
        One list for each depth, one figure in it for each length.
    """

    def share(depth: float, length: int) -> float:
        cell, right = replace(task, depth=depth, length=length), 0
        for start in range(0, rows, at_once):
            batch = cell.batch(range(start, min(start + at_once, rows)), seed=seed, filler=filler)
            said_Bn = logits(batch)[:, -1 - cell.digits : -1].argmax(-1).cpu()
            right += int((said_Bn == batch.labels[:, -cell.digits :]).all(1).sum())
        return right / rows

    return [[share(depth, length) for length in lengths] for depth in depths]
