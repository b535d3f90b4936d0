"""Run under a launcher as `hanging_worker.py PHASE train …`: `fusiontree train`, in which process 1 stands still.

PHASE is where in the third step; "stopped": process 0, and all of it, as a machine that hangs. One that ends with "!"
waits without an end, as NCCL does.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch

from fusiontree.cli import main
from fusiontree.train import checkpoint
from fusiontree.train.engine import TrainingEngine


def prepare(engine: TrainingEngine, phase: str) -> None:
    layer = engine.parallel.module.layers[0]
    read, save = engine.train_loader._source.read, checkpoint.save_file

    def stand_still(*_: Any) -> None:
        if engine.step == (3 if phase == "saving" else 2):
            if phase == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(120)

    def slow_read(start: Any) -> Iterator[Any]:
        for record in read(start):
            stand_still()
            yield record

    if phase == "reading data":
        engine.train_loader._source.read = slow_read  # type: ignore[method-assign]
    elif phase == "forward":
        layer.register_forward_pre_hook(stand_still)
    elif phase == "saving":
        checkpoint.save_file = lambda *content: stand_still() or save(*content)  # type: ignore[func-returns-value]
    else:
        layer.register_full_backward_pre_hook(stand_still)


def hang(phase: str) -> None:
    run = TrainingEngine.run

    def hanging_run(engine: TrainingEngine, **arguments: Any) -> Any:
        if phase.endswith("!"):
            torch.distributed.distributed_c10d._set_pg_timeout(timedelta(hours=1))
        if engine.processes.index == (0 if phase.startswith("stopped") else 1):
            prepare(engine, phase.rstrip("!"))
        return run(engine, **arguments)

    TrainingEngine.run = hanging_run  # type: ignore[method-assign]


if __name__ == "__main__":
    hang(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
