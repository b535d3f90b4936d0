"""The records that the stages hand each other: versioned JSON files, each checked when it is read.

Every file says what it holds and in which version of the format (`"kind"`, `"version"`), is written atomically, and is
strict JSON: a number that is not finite is written as the string `"NaN"`, `"Infinity"` or `"-Infinity"`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from typing_extensions import Self

from fusiontree.artifacts.base import Artifact, Record
from fusiontree.artifacts.plan import Branch, BranchKind, CutStep, LayerDecision, PrunePlan
from fusiontree.atomic import atomic_directory, atomic_write
from fusiontree.errors import InputError
from fusiontree.version import __version__

__all__ = [
    "AnswerStatistics",
    "Artifact",
    "Branch",
    "BranchKind",
    "CutStep",
    "DistanceAnswers",
    "EvalReport",
    "GateStatistics",
    "HealReport",
    "LayerDecision",
    "LayerGateStatistics",
    "PositionLoss",
    "PrunePlan",
    "RunManifest",
    "TaskAnswers",
    "TaskReport",
    "atomic_directory",
    "atomic_write",
    "checkpoint_name",
    "checkpoint_step",
    "git_revision",
    "library_versions",
    "make_directory",
]

_STEP_NAME = re.compile(r"step_(\d{8,})")

CORE_LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "accelerate", "numpy")


def checkpoint_name(step: int) -> str:
    """Directory name of the checkpoint after `step` optimizer steps."""
    return f"step_{step:08d}"


def checkpoint_step(path: Path) -> int | None:
    """The step in a checkpoint directory's name; None for another name."""
    match = _STEP_NAME.fullmatch(path.name)
    return int(match.group(1)) if match else None


class RunManifest(Artifact):
    """Where a run came from: enough to start it again."""

    KIND = "run_manifest"

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


class PositionLoss(Record):
    """Loss of the tokens at document positions start <= position < end."""

    start: int
    end: int
    tokens: int
    loss: float
    """Mean, in nats per token."""


class AnswerStatistics(Record):
    """How well answers are known, each predicted from all that stands before it."""

    answers: int
    right: float
    """Share of the answers of which every token is the likeliest next one, as greedy decoding would have to find it."""
    tokens: int
    """Of all answers."""
    loss: float
    """Mean, in nats per token."""


class DistanceAnswers(AnswerStatistics):
    """Those with start <= tokens between the clue's end and the question's start < end."""

    start: int
    end: int


class TaskAnswers(AnswerStatistics):
    """Those of one kind of task."""

    task: Literal["needle", "recall", "copy"]
    """A fact asked for, a value of a list, a sequence repeated."""
    by_distance: list[DistanceAnswers]


class TaskReport(Record):
    """What a model finds again in documents that long-context tasks were written into."""

    written: list[str]
    """What was written into every document that is long enough: `needle`, `structured` (a list or a sequence)."""
    seed: int
    """What was written follows from it and the documents' numbers."""
    documents: int
    """Documents with tasks."""
    tokens: int
    """Tokens in them, tasks included."""
    too_short: int
    """Documents left out because they are too short to carry a task."""
    results: list[TaskAnswers]


class EvalReport(Artifact):
    """How well a model predicts a text."""

    KIND = "eval_report"
    VERSION = 2  # 1 knows no `tasks`

    model: str
    """Path or name of the model."""
    data: list[str]
    """Files evaluated."""
    tokens: int
    """Tokens predicted."""
    loss: float
    """Mean, in nats per token."""
    perplexity: float
    """exp(loss), per token of the model's own tokenizer."""
    by_position: list[PositionLoss] = []
    tasks: TaskReport | None = None
    """What is found again in the same documents, where that was asked for; all else is about the texts as they are."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """How it was measured: context length, data type, device, limits."""
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())


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


def library_versions(names: Sequence[str] = CORE_LIBRARIES) -> dict[str, str]:
    """Installed versions of FusionTree, Python and those of the distributions `names` that are there."""
    versions = {"fusiontree": __version__, "python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


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
