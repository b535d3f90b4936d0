"""What a training run leaves in its directory, read from its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fusiontree.artifacts import GateStatistics
from fusiontree.errors import InputError


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last row that is still being written is left out.

    Raises:
        InputError: there is no such file, or a row before the last is not JSON or names no step.
    """
    rows = []
    for place, line in _lines(run, "metrics.jsonl"):
        row = json.loads(line)
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise InputError(f"{place} is not a row of metrics: it names no step")
        rows.append(row)
    return rows


def read_gates(run: Path) -> list[GateStatistics]:
    """The records of a run's gates.jsonl; a last one that is still being written is left out.

    Raises:
        InputError: there is no such file, it is empty, or a record before the last is broken.
    """
    records = [GateStatistics.loads(line, source=source) for source, line in _lines(run, "gates.jsonl")]
    if not records:
        raise InputError(f"{run / 'gates.jsonl'} holds no record yet; train further, or set gate_monitor.enabled: true")
    return records


def _lines(run: Path, name: str) -> list[tuple[str, str]]:
    """(`FILE:LINE`, text) of each row that is whole."""
    path = run / name
    if run.is_file():
        raise InputError(f"{run} is a file; name the directory of a training run")
    if not run.is_dir():
        raise InputError(f"run directory {run} does not exist")
    if not path.is_file():
        raise InputError(f"{run} holds no {name}: it is not the directory of a training run, or recorded none")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number} is not JSON: {error}") from error
        found.append((f"{path}:{number}", line))
    return found
