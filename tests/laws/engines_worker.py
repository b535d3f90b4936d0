"""Run under torchrun: trains the jobs of a JSON file one by one, and writes what their forwards compute in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fusiontree.errors import InputError
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.parallel import Parallel, ZeroRedundancy
from fusiontree.train.settings import RunSettings


def shares(parallel: Parallel) -> dict[str, Any]:
    """What this process holds of the whole, and how DeepSpeed says that it runs."""
    state = [moment for state in parallel._adamw.state.values() for name, moment in state.items() if name != "step"]
    local = sum(getattr(moment, "_local_tensor", moment).numel() for moment in state)
    seen = {"moments": local / (2 * parallel.num_parameters)}
    if isinstance(parallel, ZeroRedundancy):
        zero = parallel._zero
        seen |= parallel.what_runs
        seen["parameters"] = sum(parameter.numel() for parameter in parallel.names) / parallel.num_parameters
        seen["gradients are divided"] = zero.partition_gradients if parallel.stage < 3 else True
        seen["steps on host memory"] = zero.offload_optimizer if parallel.stage == 3 else zero.cpu_offload
    return seen


def main(jobs_file: Path) -> None:
    for job in json.loads(jobs_file.read_text()):
        engine = TrainingEngine(RunSettings.parse(job["settings"]), resume=job["resume"])
        seen: dict[str, Any] = {}

        def look(module: torch.nn.Module, arguments: Any, output: torch.Tensor, seen: dict[str, Any] = seen) -> None:
            seen |= {"weight": str(module.weight.dtype), "output": str(output.dtype)}

        def look_at_recurrence(module: Any, arguments: Any, output: Any, seen: dict[str, Any] = seen) -> None:
            seen |= {name: str(getattr(module, name).dtype) for name in ("A_log", "D", "dt_bias")}

        block = engine.parallel.module.layers[0]
        block.fusion_proj.register_forward_hook(look)
        block.mamba.register_forward_hook(look_at_recurrence)
        spoilt = job.get("spoilt", [])

        def spoil(module: Any, arguments: Any, output: Any, engine: Any = engine, spoilt: list[int] = spoilt) -> Any:
            # Of one process alone: all of them have to leave the step out.
            wrong = module.training and engine.step + 1 in spoilt and engine.processes.index == 1
            return output * float("nan") if wrong else output

        if spoilt:
            block.attention.register_forward_hook(spoil)
        try:
            engine.run()
        except InputError as error:
            seen["error"] = str(error)
        seen |= shares(engine.parallel)
        if engine.processes.is_main:
            run = Path(job["settings"]["output_dir"])
            (run / "seen.json").write_text(json.dumps({**seen, "kind": type(engine.parallel.model).__name__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
