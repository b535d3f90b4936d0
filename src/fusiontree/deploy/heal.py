"""Healing: a short distillation of a cut model from its parent, through the one training engine."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

from fusiontree.artifacts import HealReport, PrunePlan, RunManifest, atomic_write
from fusiontree.config import apply_overrides, load_yaml
from fusiontree.data.tokenizer import holds_tokenizer
from fusiontree.deploy.export_pruned import CARD, CARD_HEADER, PLAN
from fusiontree.deploy.loading import find_model, load
from fusiontree.deploy.reference import model_fingerprint, planned_dtype
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModelConfig
from fusiontree.train.checkpoint import load_model, no_progress_bar
from fusiontree.train.checkpoint_files import LATEST
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings, as_run_settings

REPORT = "heal_report.json"
MANIFEST = "manifest.json"
#: Of the parent's steps, and of these for warm-up, where nothing else is asked for.
SHARE_OF_STEPS = 0.1
#: Of the parent's highest learning rate: its weights are near where they should be, but the optimizer starts anew.
SHARE_OF_RATE = 0.3


@dataclass(frozen=True)
class Healed:
    """How healing ended: the report, None where it was stopped before its end by a signal."""

    report: HealReport | None
    run: Path
    stopped_by: Signals | None


def heal(
    settings: RunSettings,
    *,
    resume: str | None = None,
    draw: Callable[[Path], Sequence[Path]] | None = None,
    go_on_with: str | None = None,
) -> Healed:
    """Trains a cut model towards its teacher, and says how much of what the cut lost is recovered.

    Args:
        settings: as `heal_settings` makes them.
        resume: as of `fusiontree.train`.
        draw, go_on_with: as of `TrainingEngine.run`.

    Raises:
        InputError: there is nothing to evaluate on, or as training.
    """
    if not settings.evaluates:
        raise InputError(
            "healing reports the loss that it recovers: name data.eval_paths, and training.eval_interval above 0"
        )
    with no_progress_bar():
        engine = TrainingEngine(settings, resume=resume)
    result = engine.run(draw, go_on_with=go_on_with)
    if result.stopped_by is not None:
        return Healed(None, result.run, result.stopped_by)
    assert engine.loss.teacher is not None and settings.training.init_from is not None
    # A run that was complete already has not evaluated.
    after = result.evaluation or engine.evaluation.measure(engine.parallel.model)
    export = load_model(Path(settings.training.init_from)).to(engine.processes.device)
    before, parent = (engine.evaluation.measure(model) for model in (export, engine.loss.teacher.model))
    assert after is not None and before is not None and parent is not None
    report = HealReport(
        export=settings.training.init_from,
        parent=str(settings.loss.teacher),
        steps=result.step,
        tokens=engine.meter.tokens,
        eval_tokens=after.tokens,
        parent_loss=parent.loss,
        export_loss=before.loss,
        healed_loss=after.loss,
    )
    if engine.processes.is_main:
        report.save(result.run / REPORT)
        atomic_write((result.run / LATEST).resolve() / CARD, _card(report, result.run))
    return Healed(report, result.run, None)


def _card(report: HealReport, run: Path) -> str:
    """The model card of the healed model: that of the export, and what healing won back."""
    card, name = Path(report.export) / CARD, Path(report.export).name
    before = card.read_text(encoding="utf-8") if card.is_file() else CARD_HEADER + f"\n# {run.name}\n"
    before = before.replace(f"\n# {name}, a pruned ", f"\n# {run.name}, a healed {name}, a pruned ")
    before = before.replace(f'fusiontree.load("{name}")', f'fusiontree.load("{run.name}")')
    losses = {"parent": report.parent_loss, "export": report.export_loss, "healed": report.healed_loss}
    rows = "".join(f"| {name} | {loss:.4f} | {math.exp(loss):.2f} |\n" for name, loss in losses.items())
    return (
        f"{before.rstrip()}\n\n## Healed\n\nThese weights are the export's after {report.steps:,} steps "
        f"({report.tokens:,} tokens) of distillation from `{_from_here(report.parent)}`: "
        f"{recovery(report)}.\n\n"
        f"| | loss | perplexity |\n|---|---|---|\n{rows}\nNats per token, on {report.eval_tokens:,} tokens of the "
        "run's evaluation data.\n"
    )


def recovery(report: HealReport) -> str:
    """How much of the loss that the cut cost is won back, in words."""
    if report.recovered is None:
        return "the cut had cost nothing"
    return f"{100 * report.recovered:.0f} % recovered" if report.recovered <= 1 else "more recovered than the cut cost"


def is_parent(parent: str | os.PathLike[str], export: str | os.PathLike[str]) -> bool:
    """Whether a model is the one that an export was cut from; also where the export does not tell."""
    folder = find_model(export)
    if not (folder / PLAN).is_file():
        return True
    plan = PrunePlan.load(folder / PLAN)
    return plan.model in (None, model_fingerprint(load(parent, device="cpu", dtype=planned_dtype(plan))))


def _from_here(path: str) -> str:
    """A path below the working directory without what leads to that."""
    place = Path(path)
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else path


def heal_settings(
    export: str | os.PathLike[str],
    *,
    parent: str | os.PathLike[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
) -> RunSettings:
    """The settings of a run that heals an export.

    Data and batch are those of the run that trained the parent, or of `config`; of its steps a tenth, of which a tenth
    warm up to a third of its learning rate. The model is the export's, the teacher the parent.

    Args:
        export: folder that `export` wrote.
        parent: model folder or run directory; None: where the export's manifest says that it comes from.
        config: YAML file of a run; None: that of the parent's run.
        overrides: `section.key=value`.

    Raises:
        InputError: no export, no parent, or no settings at these places.
    """
    folder = find_model(export)
    teacher = find_model(parent) if parent is not None else _parent_of(folder)
    if config is None:
        config = teacher.resolve().parent.parent / "config.yaml"
        if not config.is_file():
            raise InputError(f"{teacher} does not lie in a run directory whose settings could be used: name --config")
    asked = as_run_settings(config).training  # which says what is wrong in the file, and where
    base = load_yaml(config)
    steps = max(1, round(SHARE_OF_STEPS * asked.max_steps))
    shortened = {
        "init_from": os.path.abspath(folder),
        "max_steps": steps,
        "warmup_steps": round(SHARE_OF_STEPS * steps),
        "learning_rate": SHARE_OF_RATE * asked.learning_rate,
    }
    model = HybridLanguageModelConfig.from_pretrained(folder)
    own: dict[str, Any] = {
        "model": {name: getattr(model, name) for name in HybridLanguageModelConfig.__annotations__},
        "training": dict(base.get("training") or {}) | shortened,
        "loss": {"distillation_coeff": 1.0} | dict(base.get("loss") or {}) | {"teacher": os.path.abspath(teacher)},
        "output_dir": f"runs/{folder.name}-healed",
    }
    if holds_tokenizer(folder):
        own["data"] = dict(base.get("data") or {}) | {"tokenizer": os.path.abspath(folder)}
    if own["loss"]["distillation_coeff"] == 0:
        own["loss"]["distillation_coeff"] = 1.0
    if own["loss"].pop("commit_from", None) is not None:
        # The parent's gates were let go: healing does not call them back.
        own["loss"].pop("commit_coeff", None)
        own["loss"] |= {"load_balance_coeff": 0.0, "entropy_reg_coeff": 0.0}
    # A curriculum's stages belong to a run of another length.
    kept: Mapping[str, Any] = {name: value for name, value in base.items() if name != "curriculum"}
    return as_run_settings(apply_overrides({**kept, **own}, list(overrides)))


def _parent_of(folder: Path) -> Path:
    manifest = folder / MANIFEST
    named = RunManifest.load(manifest).parent_run if manifest.is_file() else None
    if named is None:
        raise InputError(f"{folder} does not say what it was cut from: name its parent with --parent")
    if not Path(named).is_dir():
        raise InputError(f"{folder} was cut from {named}, which is not there: name the parent with --parent")
    return find_model(named)
