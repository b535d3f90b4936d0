"""The records that the stages hand each other: versioned JSON files, each checked when it is read.

Every file says what it holds and in which version of the format (`"kind"`, `"version"`), is written atomically, and is
strict JSON: a number that is not finite is written as the string `"NaN"`, `"Infinity"` or `"-Infinity"`.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from typing_extensions import Self

from fusiontree.artifacts.base import Artifact, Record, library_versions
from fusiontree.artifacts.evaluation import (
    AnswerStatistics,
    CodeReport,
    DistanceAnswers,
    EvalReport,
    HarnessResult,
    MQARReport,
    PasskeyReport,
    PositionLoss,
    TaskAnswers,
    TaskReport,
)
from fusiontree.artifacts.plan import Branch, BranchKind, CutStep, LayerDecision, PrunePlan
from fusiontree.artifacts.speed import BenchReport, ModelFigures, ShapeFigures
from fusiontree.atomic import atomic_directory, atomic_write
from fusiontree.errors import InputError

__all__ = [
    "AnswerStatistics",
    "Artifact",
    "BenchReport",
    "Branch",
    "BranchKind",
    "CodeReport",
    "CutStep",
    "DistanceAnswers",
    "EvalReport",
    "GateStatistics",
    "HarnessResult",
    "HealReport",
    "LayerDecision",
    "LayerGateStatistics",
    "MQARReport",
    "ModelFigures",
    "PasskeyReport",
    "PositionLoss",
    "PrunePlan",
    "RunManifest",
    "RunResume",
    "ShapeFigures",
    "TaskAnswers",
    "TaskReport",
    "atomic_directory",
    "atomic_write",
    "check_writable",
    "checkpoint_name",
    "checkpoint_step",
    "directory_for_results",
    "git_revision",
    "library_versions",
    "make_directory",
    "processor",
]

_STEP_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step in a checkpoint directory's name; None for another name."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


class RunResume(Record):
    """How a run went on after a stop."""

    step: int
    """Optimizer steps that it had taken."""
    checkpoint: str
    changed: dict[str, Any]
    """Settings that are not those of the manifest's `config`, by dotted name."""
    versions: dict[str, str]
    git_revision: str | None
    data_fingerprint: str | None
    started: str
    """UTC, ISO 8601."""
    command: str


class RunManifest(Artifact):
    """Where a run came from: enough to start it again. All but `resumes` is as it was when it began."""

    KIND = "run_manifest"
    VERSION = 2  # 1 knows no `resumes`

    config: dict[str, Any]
    """The resolved settings."""
    versions: dict[str, str]
    """Library name -> version, FusionTree and Python among them."""
    git_revision: str | None
    """Commit of the FusionTree checkout in use (`-dirty` when changed since), None for an installed package."""
    data_fingerprint: str | None
    """Digest of the training data and of what turned it into tokens."""
    parent_run: str | None = None
    """Run directory or checkpoint that this run started from."""
    started: str
    """UTC, ISO 8601."""
    command: str
    """The command line, quoted for a shell."""
    resumes: list[RunResume] = []

    @classmethod
    def collect(
        cls, config: Mapping[str, Any], *, data_fingerprint: str | None = None, parent_run: str | None = None
    ) -> Self:
        """The manifest of a run that this process starts now with the JSON-able settings `config`."""
        return cls(
            config=dict(config),
            versions=library_versions(),
            git_revision=git_revision(),
            data_fingerprint=data_fingerprint,
            parent_run=parent_run,
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=shlex.join(sys.argv),
        )

    def resumed(
        self, config: Mapping[str, Any], *, step: int, checkpoint: str, data_fingerprint: str | None = None
    ) -> Self:
        """The manifest with what this process goes on with now, at `step` from `checkpoint`."""
        now = type(self).collect(config, data_fingerprint=data_fingerprint)
        before = _dotted(self.config)
        resume = RunResume(
            step=step,
            checkpoint=checkpoint,
            changed={key: value for key, value in _dotted(config).items() if key not in before or before[key] != value},
            **now.model_dump(include={"versions", "git_revision", "data_fingerprint", "started", "command"}),
        )
        return self.model_copy(update={"resumes": [*self.resumes, resume]})


def _dotted(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _dotted(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat


class LayerGateStatistics(Record):
    """What one layer's gate did, over real tokens. A gate g weighs the Mamba branch, 1 - g the attention branch.

    A layer without a working gate (one branch only, or its branch dropped in every batch seen) has `tokens` 0, NaN
    numbers and empty lists.
    """

    branches: BranchKind
    """Which branches the layer has."""
    tokens: int
    """Real tokens that the numbers below average over."""
    mean: float = float("nan")
    """Over tokens and channels."""
    std: float = float("nan")
    """Over tokens and channels."""
    quantiles: list[float] = []
    """Gate values at the record's `quantile_levels`, read off the histogram."""
    histogram: list[float] = []
    """Share of the gate values in each of equally wide bins over (0, 1); sums to 1."""
    entropy: float = float("nan")
    """Mean binary entropy, in nats: ln 2 = 0.693 for a gate at 0.5, 0 for a decided one."""
    saturation: float = float("nan")
    """Share of gate values outside (`saturation_margin`, 1 - `saturation_margin`)."""
    mamba_norm: float = float("nan")
    """Mean over tokens of the L2 norm of the Mamba branch's output."""
    attention_norm: float = float("nan")
    """Mean over tokens of the L2 norm of the attention branch's output."""
    channel_mean: list[float] = []
    """Mean gate of each channel [H]."""


class GateStatistics(Artifact):
    """What the gates of a model did at one moment of training; `gates.jsonl` holds one a line."""

    KIND = "gate_statistics"

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Real tokens that were looked at for this record, in all ranks and micro-batches."""
    tokens_seen: int | None = None
    """Real tokens trained on since the start of the run."""
    quantile_levels: list[float] = []
    """Probabilities, such as 0.05 or 0.5, that the layers' `quantiles` belong to."""
    saturation_margin: float = 0.05
    """A gate nearer than this to 0 or 1 counts as saturated."""
    layers: list[LayerGateStatistics]
    """One per layer, first to last."""


class HealReport(Artifact):
    """What healing a cut model has won back, all losses on the same evaluation data, in nats per token."""

    KIND = "heal_report"

    export: str
    """Folder of the cut model that the run started from."""
    parent: str
    """The model that it was distilled from."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Trained on."""
    eval_tokens: int
    """Predicted in the evaluation."""
    parent_loss: float
    export_loss: float
    """Before healing."""
    healed_loss: float

    @property
    def recovered(self) -> float | None:
        """Share of the loss that the cut cost and healing won back; None where the cut cost nothing."""
        lost = self.export_loss - self.parent_loss
        return (self.export_loss - self.healed_loss) / lost if lost > 0 else None


def make_directory(path: str | os.PathLike[str], named: str) -> None:
    """Makes the directory `path` and its missing parents before work that will want to write there.

    Raises:
        InputError: it cannot be made (a file is in the way, no permission); `named` says where the path came from.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise InputError(f"{named}: the directory {path} cannot be made ({problem}); name another place") from error


@contextmanager
def directory_for_results(path: str | os.PathLike[str], named: str) -> Iterator[None]:
    """The same around the work; where that fails, what was made and still is empty goes again.

    Raises:
        InputError: as `make_directory`, or no file can be written there.
    """
    folder = Path(path)
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    make_directory(folder, named)
    try:
        check_writable(folder, named)
        yield
    except BaseException:
        with suppress(OSError):  # it holds something
            for made in missing:
                made.rmdir()
        raise


def check_writable(path: str | os.PathLike[str], named: str) -> None:
    """Tries whether files can be written in the directory `path`, or where it would have to be made; leaves nothing.

    Raises:
        InputError: they cannot (a file is in the way, no permission, a disk that is read-only or full); `named` says
            where the path came from.
    """
    place = Path(path)
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        problem = "a file is in the way" if isinstance(error, NotADirectoryError) else error.strerror
        raise InputError(f"{named}: nothing can be written to {path} ({problem}); name another place") from error


def processor() -> tuple[str, set[str]]:
    """The processor's name and, where /proc/cpuinfo tells them, its abilities."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    return name, flags


def git_revision() -> str | None:
    """The commit of the git checkout that this package runs from, `-dirty` appended when tracked files differ from it.

    None when it does not run from a checkout of its own (an installed package, or one inside another project's).
    """

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, check=True, capture_output=True, timeout=10, text=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None
