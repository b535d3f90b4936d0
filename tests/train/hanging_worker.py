"""Run under torchrun: trains, but process 1 stands still at the third step."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from fusiontree.errors import InputError
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings


def main(settings: dict[str, Any]) -> None:
    engine = TrainingEngine(RunSettings.parse(settings))
    if engine.processes.index == 1:

        def stand_still(*_: Any) -> None:
            if engine.step == 2:
                time.sleep(120)

        # Before it begins the step, as a process does that waits for its disk.
        engine.train_loader.set_shape = stand_still  # type: ignore[method-assign, assignment]
        post = engine.processes.post
        engine.processes.post = lambda step: None if step == 3 else post(step)  # type: ignore[method-assign]
    try:
        engine.run()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
