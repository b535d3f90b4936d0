"""A run that stops and goes on in another engine, or the same, is one that never stopped (law 10), in all it keeps.

Two real processes of torchrun on the CPU train all legs but those of one process.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from resume_worker import train
from safetensors.torch import load_file

import fusiontree
import warm

WORKER = Path(__file__).with_name("resume_worker.py")
STEPS, SAVED = 16, (4, 8, 12, 16)
LAST = 7  # of the runs that stay in their engine
LEGS = {"one": 4, "ddp": 8, "zero2": 12}  # to which step; one process takes the rest
ENGINES: dict[str, dict[str, Any]] = {"ddp": {}, "zero2": {"zero_stage": 2}}
CLOCK = {"seconds", "flops", "elapsed", "tokens_per_second", "tflops", "peak_memory_gib"}
# In float32, where sums come in another order. Seen: 2e-7 of the losses; branches' mean outputs, which are kept to six
# digits, differ in the last; 6e-7 in the weights and 2e-8 in the moments.
ROUNDING = {"rel": 2e-5, "abs": 1e-6}
WEIGHTS = {"atol": 5e-6, "rtol": 0.0}
# Everything that is drawn, accumulated or depends on the step. Rows of the logs and stages of the curriculum (steps 6
# and 10) span the stops; dropout differs from process to process, so it is on only where their number stays.
SECTIONS: dict[str, Any] = {
    "model": {"drop_branch_prob": 0.3},
    "training": {
        "max_steps": STEPS,
        "log_interval": 3,
        "eval_interval": 4,
        "save_interval": 4,
        "save_total_limit": None,
        "save_best": True,
        "lr_schedule": "wsd",
        "lr_decay_ratio": 0.5,
    },
    "curriculum": {"stages": [{"length": 12, "steps": 6}, {"length": 16, "tokens": 768}]},
    "loss": {"gate_margin": 0.0, "commit_from": 0.2, "commit_coeff": 0.3},
    "gate_monitor": {"interval": 3, "plan_min_steps": 0},
}


@pytest.fixture(scope="module")
def runs(run_settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the runs `straight`, `legs` and, of each engine, NAME-straight and NAME-stopped."""
    directory = tmp_path_factory.mktemp("resumed")

    def settings(name: str, processes: int, **changes: Any) -> dict[str, Any]:
        sections = {key: SECTIONS.get(key, {}) | changes.get(key, {}) for key in SECTIONS.keys() | changes.keys()}
        sections["data"] = {"shuffle_block": 16, "needle_in_haystack_prob": 0.2, "structured_task_prob": 0.2}
        sections["training"] = {"batch_size": 4 // processes} | sections["training"]
        return run_settings(**sections, output_dir=str(directory / name))

    def of_engine(engine: str) -> dict[str, Any]:
        return {"device": "cpu", "num_threads": 1, **ENGINES[engine]}

    jobs: list[tuple[dict[str, Any], int | None]] = []
    for engine in ENGINES:
        jobs.append((settings("legs", 2, system=of_engine(engine)), LEGS[engine]))
    for engine in ENGINES:
        changes = {"model": {"dropout": 0.1}, "training": {"max_steps": LAST}, "system": of_engine(engine)}
        jobs.append((settings(f"{engine}-straight", 2, **changes), None))
        jobs += [(settings(f"{engine}-stopped", 2, **changes), stop) for stop in (3, 6, None)]
    file = tmp_path_factory.mktemp("jobs") / "jobs.json"
    file.write_text(json.dumps(jobs))
    with torch.enable_grad():  # which the laws of inference go without
        train(settings("straight", 1))
        train(settings("legs", 1), LEGS["one"])
        done = subprocess.run(
            [*warm.torchrun(), str(WORKER), str(file)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        train(settings("legs", 1))
    return directory


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def require_close(found: Any, expected: Any, where: str = "") -> None:
    """JSON values: floating-point numbers may differ by the rounding of sums, nothing else may; clocks are left out."""
    if isinstance(expected, dict):
        assert found.keys() - CLOCK == expected.keys() - CLOCK, where
        for key in expected.keys() - CLOCK:
            require_close(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            require_close(found[index], value, f"{where}[{index}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, **ROUNDING), where
    else:
        assert found == expected, where


def state(run: Path, step: int) -> dict[str, Any]:
    content = json.loads((run / "checkpoints" / f"step_{step:08d}" / "training_state" / "state.json").read_text())
    content["gate_monitor"]["last"] = json.loads(content["gate_monitor"]["last"])
    return content


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return fusiontree.load(run / "checkpoints" / f"step_{step:08d}", device="cpu").state_dict()


def moments(run: Path, step: int) -> dict[str, torch.Tensor]:
    shares = (run / "checkpoints" / f"step_{step:08d}" / "training_state").glob("process-*.safetensors")
    return {name: value for share in shares for name, value in load_file(share).items()}


@pytest.mark.parametrize("step", SAVED)
@pytest.mark.parametrize("part", ["loader", "gate_monitor", "meter", "guard", "best"])
def test_engines_hand_on_all_that_the_next_step_depends_on(runs: Path, part: str, step: int) -> None:
    """The place in the data, what the gates did, the open row, the losses that spikes are told by, the best loss."""
    found, expected = (state(runs / name, step) for name in ("legs", "straight"))
    assert expected[part]
    require_close(found[part], expected[part])


@pytest.mark.parametrize("step", SAVED)
@pytest.mark.parametrize("tensors", [weights, moments])
def test_engines_hand_on_weights_and_moments(runs: Path, tensors: Callable[..., Any], step: int) -> None:
    found, expected = (tensors(runs / name, step) for name in ("legs", "straight"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name, **WEIGHTS)


@pytest.mark.parametrize("name", ["metrics.jsonl", "gates.jsonl", "draws-0.jsonl"])
def test_the_logs_are_those_of_a_run_that_never_stopped(runs: Path, name: str) -> None:
    """Schedule, curriculum and the weights of the loss step for step, gates, and what random generators stood at."""
    found, expected = (rows(runs / run / name) for run in ("legs", "straight"))
    require_close(found, expected)
    if name == "metrics.jsonl":
        trained = [row for row in expected if "lm_loss" in row]
        assert [row["length"] for row in trained] == [12, 12, 16, 24, 24, 24]
        assert len({row["lr"] for row in trained}) > 3 and len({row["entropy_coeff"] for row in trained}) > 3


@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_engine_goes_on_exactly(runs: Path, engine: str) -> None:
    """Stopped twice, with dropout: bit for bit, in both processes."""
    straight, stopped = runs / f"{engine}-straight", runs / f"{engine}-stopped"
    for tensors in (weights, moments):
        found, expected = tensors(stopped, LAST), tensors(straight, LAST)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())

    def without_clocks(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_clocks(part) for key, part in value.items() if key not in CLOCK}
        return value

    assert without_clocks(state(stopped, LAST)) == without_clocks(state(straight, LAST))
    for name in ("metrics.jsonl", "gates.jsonl", "draws-0.jsonl", "draws-1.jsonl"):
        found, expected = ([without_clocks(row) for row in rows(run / name)] for run in (stopped, straight))
        assert found == expected, name
