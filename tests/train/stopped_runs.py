"""Runs that are stopped on their way, and what is to be equal afterwards."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

import warm

CLOCK = ("tokens_per_second", "elapsed", "tflops", "mfu", "peak_memory_gib")  # of the machine, not of the run


def rows(run: Path, name: str) -> list[dict[str, Any]]:
    """Of a log that a run may be writing to: what stands behind its last line break is no row yet."""
    path = run / name
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"lm_loss"') if path.exists() else 0


def stop(sections: dict[str, Any], run: Path, number: signal.Signals, at_step: int) -> tuple[int, str]:
    """Train in a process of its own, signal it once it has logged `at_step`; its exit code and standard error."""
    config = run.parent / f"{run.name}.yaml"
    config.write_text(yaml.safe_dump(sections))
    process = subprocess.Popen(
        [warm.python(), "-m", "fusiontree", "train", "--config", str(config), "--resume", "auto"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while steps_logged(run) < at_step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def final(run: Path) -> dict[str, torch.Tensor]:
    path = (run / "latest").resolve()
    return load_file(path / "model.safetensors") | load_file(path / "training_state" / "process-00000.safetensors")


def halt_after(engine: Any, step: int) -> None:
    """Deliver SIGTERM to this process as soon as the engine has shown `step`."""
    show = engine.meter.add

    def add(*arguments: Any) -> None:
        show(*arguments)
        if engine.step >= step < engine.settings.training.max_steps:
            signal.raise_signal(signal.SIGTERM)

    engine.meter.add = add
