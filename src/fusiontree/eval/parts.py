"""An evaluation part by part: each is written down as soon as it is done, and not measured again while nothing that its
figures depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusiontree.artifacts import EvalReport, library_versions
from fusiontree.errors import InputError


@dataclass(frozen=True)
class Part:
    """One measurement.

    name: a word for it.
    fields: those of the report that it fills; of the ones that are dictionaries, its own keys.
    depends_on: whatever its figures depend on, as plain values.
    measure: gives the fields.
    check: says what is wrong with it as far as that is quickly seen, before any part is measured.
    """

    name: str
    fields: Mapping[str, Sequence[str] | None]
    depends_on: Mapping[str, Any]
    measure: Callable[[], dict[str, Any]]
    check: Callable[[], Any] = lambda: None

    @property
    def digest(self) -> str:
        # The versions that a report names are thereby those of every part in it.
        content = {"part": self.name, "versions": library_versions(), **self.depends_on}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def found_in(self, report: EvalReport) -> dict[str, Any] | None:
        """Its fields of an earlier report; None where that does not hold this very measurement."""
        if report.parts.get(self.name) != self.digest:
            return None
        return {
            field: getattr(report, field) if keys is None else {key: getattr(report, field)[key] for key in keys}
            for field, keys in self.fields.items()
        }


def run_parts(
    report: EvalReport,
    parts: Sequence[Part],
    path: Path,
    *,
    again: bool = False,
    on_kept: Callable[[str], None] = lambda name: None,
) -> EvalReport:
    """Measures the parts one after the other, and writes the report to `path` after each, with all that is kept.

    Args:
        report: what is known before: model and settings.
        parts: in the order in which they are measured.
        path: of the report; parts that the report there holds, with the same dependencies, are taken from it.
        again: take none.
        on_kept: called with the name of each that was.

    Returns:
        The report, which holds what was asked for and nothing else.
    """
    earlier = None if again else _earlier(path)
    found: dict[str, dict[str, Any]] = {}
    for part in parts:
        if earlier is not None and (kept := part.found_in(earlier)) is not None:
            found[part.name] = kept
            on_kept(part.name)
    missing = [part for part in parts if part.name not in found]
    for part in missing:
        part.check()
    for part in missing:
        found[part.name] = part.measure()
        _joined(report, parts, found).save(path)
    whole = _joined(report, parts, found)
    if not missing:  # the report there may hold more than was asked for
        whole.save(path)
    return whole


def _joined(report: EvalReport, parts: Sequence[Part], found: Mapping[str, dict[str, Any]]) -> EvalReport:
    """The report with what was found of the parts, in their order."""
    for part in parts:
        if part.name in found:
            update = {**found[part.name], "parts": {part.name: part.digest}}
            joined = {
                field: getattr(report, field) | value if isinstance(value, dict) else value
                for field, value in update.items()
            }
            report = report.model_copy(update=joined)
    return report


def _earlier(path: Path) -> EvalReport | None:
    """The report at `path`; none where it cannot be read, which is no reason not to write a new one."""
    try:
        return EvalReport.load(path)
    except InputError:
        return None


def files_identity(paths: Iterable[str | Path]) -> list[list[Any]]:
    """Path, size and time of the last change of each file; of a folder, of all files in it."""
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
        if file.is_file() and "__pycache__" not in file.parts
    ]
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
