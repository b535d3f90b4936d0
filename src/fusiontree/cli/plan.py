"""`fusiontree plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fusiontree.cli._options import was_given
from fusiontree.errors import InputError

if TYPE_CHECKING:
    from fusiontree.artifacts import GateStatistics, PrunePlan
    from fusiontree.train.settings import GateMonitorSettings


def plan(
    call: typer.Context,
    model: Path = typer.Argument(..., help="Model folder or run directory; with --show also a plan that is there."),
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Thresholds of a plan by gates alone, such as gate_monitor.plan_records=3."
    ),
    data: list[str] = typer.Option(None, "--data", help="Calibration text: files or globs, as of `fusiontree eval`."),
    target: list[str] = typer.Option(
        None, "--target", help="decode=1.4x, prefill=1.2x, memory=0.75x, parameters=0.8x, max_loss_increase=0.05."
    ),
    criterion: str = typer.Option(
        "ablation", "--criterion", help="gate, contribution, ablation, recall, trained or random."
    ),
    out: Path = typer.Option(None, "--out", help="Plan file to write; default: prune_plan_CRITERION.json in MODEL."),
    show: bool = typer.Option(False, "--show", help="Draw the plan: layers x branches."),
    empty_layers: bool = typer.Option(
        False, "--empty-layers", help="Let a layer lose both branches, for more than one in each allows."
    ),
    heads: bool = typer.Option(
        None,
        "--heads/--no-heads",
        help="Also cut single heads; default: by ablation and recall, which measure that.",
    ),
    freeze_gates: float = typer.Option(
        None, "--freeze-gates", min=0, help="First freeze gates, for so many nats; 0 = none; default: 0.002."
    ),
    tokens: int = typer.Option(16384, "--tokens", min=1, help="Calibration tokens."),
    length: int = typer.Option(512, "--length", min=2, help="Tokens of a row of calibration text."),
    context: int = typer.Option(4096, "--context", min=1, help="Tokens at which speed and memory are counted."),
    rounds: int = typer.Option(3, "--rounds", min=1, help="Rounds of timing."),
    seed: int = typer.Option(0, "--seed", min=0, help="Of the criteria random and trained."),
    text_key: str = typer.Option("text", "--text-key", help="Key of a JSONL record that holds its text."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as saved."),
) -> None:
    """Decide which branches and heads of a model to cut so that it meets a budget, for `fusiontree export`.

    What a cut costs is measured on the calibration text, what it saves on this machine. `--criterion gate` without
    a target cuts by thresholds what the run recorded about its gates, with constants from the calibration text.
    `fusiontree plan PLAN.json --show` draws a plan.
    """
    from fusiontree.artifacts import PrunePlan
    from fusiontree.cli._plan_table import draw

    if model.is_file():
        if not show:
            raise InputError(f"{model} is a file: name a model to plan for, or add --show to draw a plan")
        for given in call.command.params:
            if given.name not in ("model", "show") and was_given(call, given.name or ""):
                raise InputError(f"{model} is a plan, which --show draws as it is: leave out {given.opts[0]}")
        draw(PrunePlan.load(model))
        return
    if show and model.suffix == ".json" and not model.exists():
        raise InputError(f"plan {model} does not exist")
    from fusiontree.artifacts import directory_for_results
    from fusiontree.cli._options import dtype_named, working
    from fusiontree.deploy.budget import parse_targets
    from fusiontree.deploy.calibration import calibration_text
    from fusiontree.deploy.loading import find_model, load
    from fusiontree.deploy.plan_settings import FREEZE_GATES, PlanSettings
    from fusiontree.deploy.prune_plan import make_plan, plan_by_thresholds
    from fusiontree.eval.texts import Texts

    targets = parse_targets(target or [])
    by_thresholds = criterion == "gate" and not targets
    settings = None
    if by_thresholds:
        if other := next((word for word in overrides or [] if not word.startswith("gate_monitor.")), None):
            raise InputError(f"{other}: a plan by thresholds reads those of gate_monitor alone")
        meant = {"--heads": heads, "--empty-layers": empty_layers, "--freeze-gates": freeze_gates}
        for option in (name for name, is_asked in meant.items() if is_asked):
            raise InputError(f"{option} goes with a --target: thresholds take one branch of a layer and nothing else")
    if not by_thresholds:
        if overrides:
            raise InputError(f"{overrides[0]}: only --criterion gate without --target reads thresholds")
        settings = PlanSettings(
            criterion=criterion,
            targets=targets,
            empty_layers=empty_layers,
            heads=heads,
            freeze_gates=FREEZE_GATES if freeze_gates is None else freeze_gates,
            context=context,
            rounds=rounds,
            seed=seed,
        )
    if not data:
        raise InputError(
            "--data is missing: name calibration text, on which constants are recorded, other than what you will judge "
            "the result by"
        )
    source = str(find_model(model))
    # Not prune_plan.json: that is the run's own, which training refreshes, or the one that an export was made by.
    destination = out or (model / f"prune_plan_{criterion}.json")
    if destination.is_dir():
        raise InputError(f"--out {destination} is a directory: name a file")
    with directory_for_results(destination.parent, "--out"):
        records, thresholds = _recorded(model, overrides or []) if by_thresholds else ([], None)
        documents = Texts(data, text_key=text_key, where="--data")
        loaded = load(model, device=device, dtype=dtype_named(dtype))
        text = calibration_text(loaded, documents, tokens=tokens, length=length)
        with working("plan") as progress:
            if settings is not None:
                made = make_plan(loaded, text, settings, source=source, progress=progress)
            else:
                assert thresholds is not None
                made = plan_by_thresholds(
                    loaded,
                    text,
                    records,
                    thresholds,
                    source=source,
                    context=context,
                    rounds=rounds,
                    progress=progress,
                )
        made.measured["calibration_data"] = documents.paths
        made.save(destination)
    if show:
        draw(made)
    print(summary(made))
    print(destination)


def _recorded(model: Path, overrides: list[str]) -> tuple[list[GateStatistics], GateMonitorSettings]:
    """What the run recorded about its gates up to the checkpoint, and its thresholds."""
    from fusiontree.artifacts import checkpoint_step
    from fusiontree.deploy.loading import find_model
    from fusiontree.plots import read_gates
    from fusiontree.train.settings import as_run_settings, load_run_settings

    checkpoint = find_model(model).resolve()
    step, run = checkpoint_step(checkpoint), checkpoint.parent.parent
    if step is None:
        raise InputError(f"{model} is no run with gate statistics: name a run directory, or a --target to plan for")
    records = [record for record in read_gates(run) if record.step <= step]
    if not records:
        raise InputError(f"{run} has no gate statistics up to step {step}")
    config = run / "config.yaml"
    settings = load_run_settings(config, overrides) if config.is_file() else as_run_settings({}, overrides)
    return records, settings.gate_monitor


def summary(made: PrunePlan) -> str:
    """What the plan expects to deliver, in one line."""
    found = made.expected
    parts = [f"{name} {found[name]:.2f}x" for name in ("decode", "prefill", "memory", "parameters") if name in found]
    if "loss_increase" in found:
        parts.append(f"loss {found['parent_loss']:.4f} -> {found['loss']:.4f} ({found['loss_increase']:+.4f})")
    return "expected before healing: " + ", ".join(parts) if parts else "the plan expects nothing of its cut"
