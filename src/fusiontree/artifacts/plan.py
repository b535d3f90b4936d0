"""The prune plan: which branch of which layer goes, why, and what stands in for it.

Shapes: H hidden.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import safetensors.numpy
from pydantic import Field
from safetensors import SafetensorError
from typing_extensions import Self

from fusiontree.artifacts.base import Artifact, Record
from fusiontree.atomic import atomic_write
from fusiontree.errors import InputError

BranchKind = Literal["both", "mamba", "attention", "constant"]
"""Which branches a layer has; `constant`: neither, so that the layer adds one constant vector."""

Branch = Literal["mamba", "attention"]

_CONSTANTS = ("constant", "gate", "head_constants")
_CONSTANT = re.compile(rf"layers\.(\d+)\.({'|'.join(_CONSTANTS)})")


class LayerDecision(Record):
    """What a prune plan does to one layer."""

    keep: BranchKind
    """`both` leaves the branches as they are, `constant` removes both, the others keep that branch alone."""
    reason: str
    """The rule that decided, in a few words."""
    evidence: dict[str, float] = {}
    """The numbers that the rule looked at, by name."""
    constant: list[float] | None = None
    """What stands in for the removed branch's output [H]; of two branches [2H], Mamba's first; None means zeros."""
    gate: list[float] | None = None
    """What the gate becomes [H]; None: the gate stays."""
    heads: dict[Branch, list[int]] = {}
    """Heads that branches which stay lose, by their index; attention's: query heads, whole groups that share keys."""
    head_constants: list[float] | None = None
    """What stands in for the output of these heads before the output projection, one after the other, Mamba's first;
    None means zeros."""

    @property
    def has_constants(self) -> bool:
        """Whether it says what stands in for what it removes."""
        return self.constant is not None or self.head_constants is not None

    @property
    def num_heads_removed(self) -> int:
        """Of the branches that stay."""
        return sum(map(len, self.heads.values()))


class CutStep(Record):
    """One removal of a greedy plan, in the order in which they were made, and what the model is then."""

    layer: int
    branch: Branch
    """The branch that was removed."""
    heads: list[int] = []
    """Where heads of it were removed alone: which ones."""
    loss_increase: float
    """Of the calibration text against the parent, all removals so far together, in nats per token."""
    saving: dict[str, float] = {}
    """By name as in a plan's `expected`, from the costs of the branches removed so far."""


class PrunePlan(Artifact):
    """Which branch of which layer goes, and why.

    What stands in for removed branches lies beside the JSON file, in `NAME.constants.DIGEST.safetensors`.
    """

    KIND: ClassVar[str] = "prune_plan"
    # 1 has everything in the JSON file, and no fields from `model` on; 2 has no heads.
    VERSION: ClassVar[int] = 3

    criterion: str
    """How it was decided, such as `gate thresholds`."""
    thresholds: dict[str, float]
    """The criterion's numbers, by name."""
    source: str
    """The run, model or file of gate statistics that it was made from."""
    step: int | None = None
    """Optimizer step of the statistics."""
    layers: list[LayerDecision]
    """One per layer, first to last."""
    model: str | None = None
    """Fingerprint of the model that it is for; None: any with as many layers."""
    targets: dict[str, float] = {}
    """What was asked for, by name: `decode`, `prefill` (times as fast), `memory`, `parameters` (share that is left) and
    `max_loss_increase` (nats per token)."""
    expected: dict[str, float] = {}
    """What it will deliver, by the same names, before healing; and `loss`, `parent_loss` on the calibration text."""
    steps: list[CutStep] = []
    """The removals in their order."""
    measured: dict[str, Any] = Field(default_factory=dict)
    """How evidence and expectations were measured: files, tokens, context length, machine."""
    constants_file: str | None = None
    """Name of the file beside this one that holds the constants; None: they are here, or there are none."""
    constants_digest: str | None = None
    """SHA-256 of that file."""

    @property
    def layer_branches(self) -> list[BranchKind]:
        """The decisions as the model configuration's `layer_branches`."""
        return [layer.keep for layer in self.layers]

    @property
    def finer_cuts(self) -> list[str]:
        """What is cut beside whole branches, in words."""
        heads = sum(layer.num_heads_removed for layer in self.layers)
        gates = sum(layer.gate is not None for layer in self.layers)
        return [f"{heads} single heads cut"] * (heads > 0) + [f"{gates} gates frozen"] * (gates > 0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to `path`, and its constants beside it, each file whole or not at all.

        The constants have a name of their own for every content and are written first, and those of the plan that is
        replaced go last: whenever it is cut short, the plan at `path` finds its own.
        """
        constants = {
            f"layers.{index}.{name}": np.asarray(value, dtype=np.float64)
            for index, layer in enumerate(self.layers)
            for name in _CONSTANTS
            if (value := getattr(layer, name)) is not None
        }
        bare, place = self, Path(path)
        stem = place.name.removesuffix(".json")
        replaced = _constants_of_file(place, stem)
        if constants:
            content = safetensors.numpy.save(constants)
            digest = hashlib.sha256(content).hexdigest()
            layers = [layer.model_copy(update=dict.fromkeys(_CONSTANTS)) for layer in self.layers]
            named = {"constants_file": f"{stem}.constants.{digest[:12]}.safetensors", "constants_digest": digest}
            bare = self.model_copy(update={"layers": layers, **named})
            atomic_write(place.with_name(named["constants_file"]), content)
        atomic_write(path, bare.dumps(indent=2) + "\n")
        if replaced is not None and replaced.name != bare.constants_file:
            replaced.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a plan and its constants.

        Raises:
            InputError: as `Artifact.load`; the constants are missing or not those that belong to the plan.
        """
        plan = super().load(path)
        if plan.constants_file is None:
            return plan
        beside = Path(path).with_name(Path(plan.constants_file).name)
        try:
            content = beside.read_bytes()
        except OSError as error:
            raise InputError(
                f"{beside} cannot be read ({error.strerror}): {path} keeps its constants there, move both together"
            ) from error
        if hashlib.sha256(content).hexdigest() != plan.constants_digest:
            raise InputError(f"{beside} does not belong to {path} or was changed since: make the plan again")
        try:
            constants = safetensors.numpy.load(content)
        except SafetensorError as error:
            raise InputError(f"{beside} is not a safetensors file: {error}") from error
        for name, value in constants.items():
            found = _CONSTANT.fullmatch(name)
            if found is None or int(found[1]) >= len(plan.layers):
                raise InputError(
                    f"{beside} holds {name}, but {path} decides about {len(plan.layers)} layers: make the plan again"
                )
            setattr(plan.layers[int(found[1])], found[2], value.tolist())
        plan.constants_file = plan.constants_digest = None
        return plan


def _constants_of_file(plan: Path, stem: str) -> Path | None:
    """Where the constants of the plan lie that a file holds by now; None where it holds none, or a copy of another
    plan, whose constants stay the other's."""
    # Older versions wrote a name without a digest.
    own = re.compile(re.escape(stem) + r"\.constants(\.[0-9a-f]{12})?\.safetensors")
    try:
        named = json.loads(plan.read_text(encoding="utf-8"))["constants_file"]
        return plan.with_name(named) if own.fullmatch(named) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
