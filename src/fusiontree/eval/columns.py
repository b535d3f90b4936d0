"""What the report compares: runs and models, each read from its own directory, and what of them can be compared.

A run is a training run's directory (a run that heals leaves one too), a model a `from_pretrained` directory, such as a
checkpoint or an export. Whatever a directory does not hold is None or empty, and its column shows a dash there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusiontree.artifacts import (
    BenchReport,
    EvalReport,
    GateStatistics,
    HealReport,
    PrunePlan,
    RunManifest,
    checkpoint_step,
)
from fusiontree.config import load_yaml
from fusiontree.errors import InputError
from fusiontree.models.configuration import EARLIER_VALUES
from fusiontree.runs import read_gates, read_metrics

#: Of a configuration, what says nothing about the model.
_BOOKKEEPING = ("architectures", "model_type", "transformers_version")
#: Buffers, which are saved beside the parameters: running means of branch dropout.
_BUFFERS = ("mamba_mean", "attention_mean", "mean_updates")

Axis = Literal["step", "tokens", "elapsed"]
Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One run or model."""

    name: str
    kind: Literal["run", "model"]
    path: Path
    settings: Mapping[str, Any]
    """Dotted key -> value; the model's fields stand under `model.`."""
    parameters: int | None = None
    step: int | None = None
    """Of the run's newest checkpoint, or of the one that the model is."""
    manifest: RunManifest | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    gates: Sequence[GateStatistics] = ()
    plan: PrunePlan | None = None
    evaluation: EvalReport | None = None
    heal: HealReport | None = None
    bench: BenchReport | None = None
    _axes: dict[Axis, Points] = field(default_factory=dict)

    def rows(self, key: str) -> list[tuple[int, float]]:
        """Step and number of the rows that have the key."""
        return [(row["step"], row[key]) for row in self.metrics if _is_number(row.get(key))]

    def numbers(self, key: str) -> list[float]:
        return [value for _, value in self.rows(key)]

    def curve(self, key: str, axis: Axis = "step") -> Points:
        """The numbers of a key over steps, tokens or seconds; an evaluation's row stands where its step ended."""
        rows = self.rows(key)
        if axis == "step":
            return [(float(step), value) for step, value in rows]
        known = self._known(axis)
        if not known:
            return []
        steps, places = np.array(known).T
        places = np.interp([step for step, _ in rows], steps, places)
        return [(float(place), value) for place, (_, value) in zip(places, rows, strict=True)]

    def _known(self, axis: Axis) -> Points:
        if axis not in self._axes:
            found = [(float(step), value) for step, value in self.rows(axis)]
            self._axes[axis] = [(0.0, 0.0), *found] if found else []
        return self._axes[axis]


def read_columns(paths: Sequence[Path]) -> list[Column]:
    """The columns of a report, under names that tell them apart.

    Raises:
        InputError: a path that is neither a run nor a model, or a file in it that is broken.
    """
    names = [column_name(path.resolve()) for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    for index, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:index]]:
            raise InputError(f"{path} is named twice; name each run once")
    return [_read_column(path, name) for path, name in zip(paths, names, strict=True)]


def column_name(path: Path) -> str:
    """A checkpoint is named with its run: `RUN/step_…`."""
    return f"{path.parents[1].name}/{path.name}" if checkpoint_step(path) is not None else path.name


def _read_column(path: Path, name: str) -> Column:
    if not path.exists():
        raise InputError(f"{path} does not exist; name the directory of a training run or of a model")
    if (path / "metrics.jsonl").exists():
        return _read_run(path, name)
    if (path / "config.json").is_file():
        return Column(
            name=name,
            kind="model",
            path=path,
            settings=dict(_flat({"model": _model_fields(path)})),
            parameters=_parameters(path),
            step=checkpoint_step(path.resolve()),
            manifest=_if_there(RunManifest, path / "manifest.json"),
            plan=_if_there(PrunePlan, path / "prune_plan.json"),
            evaluation=_if_there(EvalReport, path / "eval_report.json"),
            bench=_if_there(BenchReport, path / "bench.json"),
        )
    raise InputError(
        f"{path} is not the directory of a training run (it holds no metrics.jsonl) nor of a model (no config.json)"
    )


def _read_run(path: Path, name: str) -> Column:
    newest = path / "latest"
    has_model = (newest / "config.json").is_file()
    settings = load_yaml(path / "config.yaml")
    model = settings.get("model")
    # The file holds what was chosen; the checkpoint also knows the rest.
    whole = _model_fields(newest) if has_model else {}
    settings["model"] = {**whole, **(model if isinstance(model, Mapping) else {})}
    reports = [path / "eval_report.json", newest / "eval_report.json"]
    return Column(
        name=name,
        kind="run",
        path=path,
        settings=dict(_flat(settings)),
        parameters=_parameters(newest) if has_model else None,
        step=checkpoint_step(newest.resolve()),
        manifest=RunManifest.load(path / "manifest.json"),
        metrics=read_metrics(path),
        gates=read_gates(path) if _has_content(path / "gates.jsonl") else (),
        plan=_if_there(PrunePlan, path / "prune_plan.json"),
        evaluation=next((EvalReport.load(report) for report in reports if report.exists()), None),
        heal=_if_there(HealReport, path / "heal_report.json"),
        bench=_if_there(BenchReport, path / "bench.json"),
    )


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _if_there(kind: type[Any], path: Path) -> Any:
    return kind.load(path) if path.exists() else None


def _model_fields(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is truncated or not JSON ({error}); it should hold a model's configuration"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} does not hold a model's configuration")
    content = EARLIER_VALUES | content
    return {key: value for key, value in content.items() if key not in _BOOKKEEPING and key[0] != "_"}


def _parameters(folder: Path) -> int:
    """Parameters of a model, counted in the heads of its files."""
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):  # a plan's constants may lie beside them
        try:
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                head = json.loads(file.read(length))
            total += sum(
                math.prod(tensor["shape"])
                for name, tensor in head.items()
                if name != "__metadata__" and not name.endswith(_BUFFERS)
            )
        except (struct.error, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
            raise InputError(f"{path} is truncated or not a safetensors file") from error
    return total


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(columns: Sequence[Column]) -> list[str]:
    """The settings in which the columns differ, in the order of the file; one that a column does not know is no
    difference, nor is where a run lies."""
    keys = dict.fromkeys(key for column in columns for key in column.settings)
    return [
        key
        for key in keys
        if key != "output_dir"
        and len({json.dumps(c.settings[key], sort_keys=True, default=str) for c in columns if key in c.settings}) > 1
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
