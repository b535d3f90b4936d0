"""A process that hangs is named by those that wait for it, wherever in a step it is, and the run ends."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launched import started_by_hand, torchrun, write

WORKER = str(Path(__file__).with_name("hanging_worker.py"))
TIMEOUT_S = 10
# Where process 1 stands still, and under what.
HANGS: dict[str, dict[str, Any]] = {
    "reading data": {},
    "forward": {"fsdp": True},
    "backward of ZeRO-2": {"zero_stage": 2},
    "backward!": {},
    "saving": {},
}


@pytest.fixture(scope="module")
def hanging(run_settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All of them at once: they do little but wait."""
    directory = tmp_path_factory.mktemp("hanging")

    def config(name: str, **system: object) -> str:
        system |= {"device": "cpu", "num_threads": 1, "timeout": TIMEOUT_S}
        training = {"eval_interval": 0}
        sections = run_settings(output_dir=str(directory / name), training=training, system=system)
        return write(sections, directory / f"{name}.yaml")

    started = {}
    for name, system in HANGS.items():
        started[name] = torchrun(WORKER, name.partition(" of ")[0], "train", "--config", config(name, **system))
    command = [WORKER, "stopped", "train", "--config", config("stopped")]
    started["stopped"], started["waits"] = started_by_hand(command, command)
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("name", HANGS)
def test_it_is_named_with_its_step_and_phase(hanging, name: str) -> None:
    began = time.monotonic()
    shown, _ = hanging[name].communicate(timeout=110)  # less than it would stand still
    assert hanging[name].returncode != 0, shown
    (sentence,) = [line for line in shown.splitlines() if line.startswith("error: ")] or [shown]
    place = f"step 3, {name.partition(' of ')[0].rstrip('!')}"
    assert sentence == (
        f"error: process 0 waited longer than system.timeout for process 1 ({place}) of 2: look at what holds it up, "
        "then go on with --resume auto"
    )
    # torchrun would wait half a minute more for the one that hangs.
    assert time.monotonic() - began < TIMEOUT_S + 20


def test_the_one_that_holds_the_store_is_named_too(hanging) -> None:
    """Without a launcher, as under SLURM, all meet at the first process, which is the one that stands still."""
    _, shown = hanging["waits"].communicate(timeout=110)
    assert hanging["waits"].returncode == 2
    (sentence,) = [line for line in shown.splitlines() if line.startswith("error: ")] or [shown]
    assert "process 1 waited longer than system.timeout for process 0 (which does not answer) of 2: look" in sentence
    assert hanging["stopped"].poll() is None
