"""Trains the jobs of a JSON file one by one, under torchrun, each until its `stop`; `train` does one of them."""

from __future__ import annotations

import json
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import torch

from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings


def train(sections: dict[str, Any], stop: int | None = None) -> None:
    """Go on with a run until it has taken `stop` steps, which the last process is asked to do; None: to its end.

    Each process leaves the state of its random generator before each forward pass in `draws-PROCESS.jsonl`.
    """
    engine = TrainingEngine(RunSettings.parse(sections), resume="auto")
    processes, add = engine.processes, engine.meter.add
    draws = (Path(sections["output_dir"]) / f"draws-{processes.index}.jsonl").open("a", encoding="utf-8")

    def draw(module: Any, arguments: Any) -> None:
        if module.training:
            state = zlib.crc32(torch.get_rng_state().numpy().tobytes())
            print(json.dumps([engine.step + 1, state]), file=draws, flush=True)

    # Several processes agree to stop in the step after the one in which one of them was asked to.
    last = None if stop is None else stop - (processes.count > 1)

    def add_and_stop(*arguments: Any) -> None:
        add(*arguments)
        if engine.step == last and processes.index == processes.count - 1:
            signal.raise_signal(signal.SIGTERM)

    engine.meter.add = add_and_stop  # type: ignore[method-assign]
    engine.parallel.module.register_forward_pre_hook(draw)
    result = engine.run()
    draws.close()
    assert stop is None or result.step == stop, f"stopped after step {result.step}"


if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(*job)
