"""What a run says of itself when it begins and when it ends."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from signal import Signals

from fusiontree.data.curriculum import LengthSchedule
from fusiontree.data.loader import Loader
from fusiontree.train.loggers import ProgressView
from fusiontree.train.optim import ParameterGroup, never_warm
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings


def announce_start(
    view: ProgressView,
    settings: RunSettings,
    processes: Processes,
    *,
    groups: Sequence[ParameterGroup],
    num_parameters: int,
    lengths: LengthSchedule,
    checkpoint: Path | None,
    passed_over: Sequence[str],
    evaluates: bool,
) -> None:
    """What runs, on what, and from where.

    Args:
        groups: of the optimizers' parameters.
        num_parameters: of the whole model.
        checkpoint: that the run goes on from.
        passed_over: a sentence for each damaged checkpoint that it does not go on from.
        evaluates: whether there is anything to evaluate on.
    """
    t = settings.training
    tokens = t.batch_size * t.gradient_accumulation_steps * processes.count * t.max_seq_length
    origin = f"resumed from {checkpoint}" if checkpoint else "new run"
    view.message(
        f"{settings.output_dir}: {origin}, {num_parameters:,} parameters, {tokens:,} tokens a step, "
        f"{engine_in_words(settings, processes)}, {'bf16 autocast' if t.mixed_precision == 'bf16' else 'float32'}"
    )
    for group in groups:
        view.message(f"{group} ({', '.join(group.patterns())})")
    for sentence in passed_over:
        view.warn(sentence)
    if (too_long := never_warm(t)) is not None:
        view.warn(too_long)
    if lengths.varies:
        view.message(f"length curriculum: rows of {lengths}")
    if not evaluates:
        reason = "data.eval_paths is empty" if t.eval_interval else "training.eval_interval is 0"
        view.message(f"no evaluation: {reason}")


def engine_in_words(settings: RunSettings, processes: Processes) -> str:
    """`cpu`, `DDP on 2 x cpu`, `DeepSpeed ZeRO-2 on 8 x cuda`."""
    device, count = processes.device.type, processes.count
    if not settings.system.is_sharded:
        return device if count == 1 else f"DDP on {count} x {device}"
    return f"{settings.system.engine} on {count} x {device}"


def announce_end(
    view: ProgressView,
    run: Path,
    step: int,
    *,
    checkpoint: Path | None,
    signal: Signals | None,
    loaders: dict[str, Loader | None],
    go_on_with: str | None = None,
) -> None:
    """How it ended, what of the data was skipped, and how to go on.

    Args:
        checkpoint: the newest.
        signal: that stopped the run before its end.
        loaders: by the name of what they read.
        go_on_with: a command; None: `fusiontree train`.
    """
    for name, loader in loaders.items():
        if loader is not None and (report := loader.report()).skipped:
            view.warn(f"{name}: {report.summary()}")
    if signal is None:
        view.message(f"done: {step} steps, checkpoint {checkpoint}")
        return
    saved = f"saved {checkpoint}" if checkpoint else "nothing to save yet"
    command = go_on_with or f"fusiontree train --config {shlex.quote(str(run / 'config.yaml'))} --resume auto"
    view.message(f"{signal.name}: stopped after step {step}, {saved}; go on with: {command}")
