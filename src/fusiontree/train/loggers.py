"""What a run leaves and shows while it trains: JSONL rows, a live line on a terminal, plain lines in a log file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fusiontree.artifacts import atomic_write
from fusiontree.errors import InputError


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with None for numbers that are not finite."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


class JsonlLog:
    """An append-only file of JSON objects that each name their `step`; every row is flushed when written."""

    def __init__(self, path: Path):
        self.path = path
        self._file: TextIO | None = None

    def truncate_after(self, step: int) -> list[dict[str, Any]]:
        """Drop the rows of later steps (and a half-written last row), so that a resumed run repeats none.

        Returns:
            The rows that stay.
        """
        if not self.path.exists():
            return []
        kept, rows = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
                rows.append(row)
        atomic_write(self.path, "".join(kept))
        return rows

    def write(self, row: Mapping[str, Any] | str) -> None:
        """Append a row, given as JSON text or as a mapping; numbers that are not finite become null.

        Raises:
            InputError: disk full or no permission.
        """
        if isinstance(row, Mapping):
            row = json.dumps(finite(row), ensure_ascii=False, allow_nan=False)
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
            self._file.write(row + "\n")
            self._file.flush()
        except OSError as error:
            self._drop()
            raise InputError(
                f"{self.path} could not be written: {error.strerror}; make room there, then go on with --resume auto"
            ) from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _drop(self) -> None:
        """Close without a second attempt to write, whose error would hide the first."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


class ProgressView:
    """Shows a run on rank 0: a bar that is redrawn on a terminal, one plain line per event elsewhere.

    Args:
        mode: "auto" looks whether standard error is a terminal.
        max_steps: of the whole run.
        start: steps already taken.
        visible: False shows nothing (other ranks).
    """

    def __init__(
        self, mode: Literal["auto", "live", "plain", "none"], max_steps: int, start: int, *, visible: bool = True
    ):
        self._console = Console(stderr=True)
        if mode == "auto":
            mode = "live" if self._console.is_terminal else "plain"
        self.mode = mode if visible else "none"
        self._visible = visible
        self._max_steps = max_steps
        self._bar: Progress | None = None
        if self.mode == "live":
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),  # last, so that a narrow terminal cuts their end
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=max_steps, completed=start, numbers="")
            self._bar.start()

    def step(self, step: int, numbers: Mapping[str, Any]) -> None:
        """After every step: redraw the live line with the newest loss, tokens/s, gate mean, learning rate and, under a
        length curriculum, the length."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=_summary(numbers))

    def row(self, row: Mapping[str, Any], eta_seconds: float) -> None:
        """At every logging interval: one plain line."""
        if self.mode == "plain":
            step = f"step {row['step']}/{self._max_steps}"
            self.message(f"{step}  {_summary(row)}  ETA {format_duration(eta_seconds)}")

    def message(self, text: str) -> None:
        """A sentence for the user, above the live line."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.mode == "plain":
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A sentence that the user must not miss: shown in every mode."""
        if self.mode != "none":
            self.message(text)
        elif self._visible:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _summary(numbers: Mapping[str, Any]) -> str:
    shown = (
        ("loss", "loss {:.4f}"),
        ("tokens_per_second", "{:.0f} tok/s"),
        ("mfu", "mfu {:.1%}"),
        ("gate_mean", "gate {:.3f}"),
        ("lr", "lr {:.2e}"),
        ("length", "length {}"),
    )
    return "  ".join(text.format(numbers[key]) for key, text in shown if numbers.get(key) is not None)


def format_duration(seconds: float) -> str:
    """1h02m03s, 2m03s or 3s."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours}h{minutes:02d}m{rest:02d}s"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
