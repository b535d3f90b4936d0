"""One process = DDP = ZeRO-2 = ZeRO-3 = FSDP2, step for step (law 9), and each goes on where another one stopped (10).

Two real processes of torchrun on the CPU train all jobs one after the other.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusiontree
import warm
from tiny_models import needs_muon

STEPS = 20
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("engines_worker.py")
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "fsdp2": {"fsdp": True},
    "zero2-offload": {"zero_stage": 2, "offload_optimizer": True},
    "offload": {"deepspeed_config": "sharded.json", "offload_optimizer": True, "offload_params": True},
}
# Small parameters otherwise stay whole in every process, and all parameters are small here.
SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
# As DeepSpeed says, and as its optimizer does: stage, offload of optimizer state and of parameters.
ZERO = {
    "zero1": (1, "none", "none"),
    "zero2": (2, "none", "none"),
    "zero3": (3, "none", "none"),
    "zero2-offload": (2, "cpu", "none"),
    "offload": (3, "cpu", "cpu"),
}
# The head is read after the model's forward pass too; tied, its gradient comes from three places.
TAUGHT_LOSS, TIED = {"distillation_coeff": 0.5, "hidden_coeff": 0.2}, {"tie_word_embeddings": True}
TAUGHT = ("ddp", "zero2", "zero3", "offload", "fsdp2")
TURNING = ("ddp", "fsdp2")  # the engines that Muon steps in
# What is summed in another order may differ by its rounding.
ROUNDING = {
    "loss": 2e-6,
    "lm_loss": 2e-6,
    "entropy_loss": 2e-6,
    "grad_norm": 2e-5,
    "gate_mean": 2e-6,
    "eval_loss": 2e-6,
}
BF16_ROUNDING = 2e-3  # of the loss; seen: 3e-4
FLOAT32_SECTIONS: dict[str, Any] = {
    "training": {
        "max_steps": STEPS,
        "batch_size": 2,
        "eval_interval": 10,
        "save_interval": 5,
        "save_total_limit": None,
    },
    "loss": {"gate_margin": 0.0},
    "gate_monitor": {"interval": 5},
}
# Of every kind of layer that only a cut leaves: one vector, merged maps, folded gates, fewer heads.
CUT = {
    "mlp": "aligned",
    "num_layers": 4,
    "layer_branches": ["both", "mamba", "attention", "constant"],
    "layer_gates": [True, False, False, True],
    "layer_merges": ["none", "z", "hz", "none"],
    "layer_heads": [{"mamba": 3, "local": 2}, None, None, None],
}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def require_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ROUNDING.keys() & other.keys():
            assert one[name] == pytest.approx(other[name], rel=ROUNDING[name]), (name, one["step"])
        for name in ("tokens", "lr"):
            assert one.get(name) == other.get(name), (name, one["step"])


@pytest.fixture(scope="module")
def settings(run_settings, tmp_path_factory) -> Callable[..., dict[str, Any]]:
    directory = tmp_path_factory.mktemp("engines")

    def build(name: str, **changes: Any) -> dict[str, Any]:
        sections = copy.deepcopy(FLOAT32_SECTIONS)
        for section, values in changes.items():
            sections[section] = sections.get(section, {}) | values
        return run_settings(**sections, output_dir=str(directory / name))

    return build


@pytest.fixture(scope="module")
def runs(settings, tmp_path_factory) -> Path:
    """The directory of all runs."""
    jobs: list[dict[str, Any]] = []

    directory = Path(settings("x")["output_dir"]).parent
    (directory / "sharded.json").write_text(json.dumps(SHARDED))

    def job(name: str, engine: str, resume: str | None = None, spoilt: tuple[int, ...] = (), **changes: Any) -> None:
        system = {"device": "cpu", "num_threads": 1, **ENGINES[engine], **changes.pop("system", {})}
        if "deepspeed_config" in system:
            system["deepspeed_config"] = str(directory / system["deepspeed_config"])
        jobs.append({"settings": settings(name, system=system, **changes), "resume": resume, "spoilt": spoilt})

    for engine in ENGINES:
        job(engine, engine)
    for engine in ("ddp", "zero2", "zero3", "fsdp2"):
        bf16 = {"mixed_precision": "bf16", "max_steps": 5, "eval_interval": 0, "save_interval": 0, "warmup_steps": 0}
        # By the shipped file, where there is one.
        file = ROOT / "configs" / f"deepspeed_{engine}.json"
        job(f"{engine}-bf16", engine, training=bf16, system={"deepspeed_config": str(file)} if file.exists() else {})
        job(f"{engine}-dropped", engine, training={"max_steps": 5, "eval_interval": 0}, model={"drop_branch_prob": 0.4})
        job(f"{engine}-cut", engine, training={"max_steps": 3, "eval_interval": 0}, model=CUT)
    taught = TAUGHT_LOSS | {"teacher": str(directory / "ddp" / "checkpoints" / "step_00000005")}
    for engine in TAUGHT:
        job(f"{engine}-taught", engine, training={"max_steps": 3, "eval_interval": 0}, loss=taught, model=TIED)
    if hasattr(torch.optim, "Muon"):
        for engine in TURNING:
            muon = {"max_steps": 8, "save_interval": 4, "eval_interval": 0, "optimizer": "muon"}
            job(f"{engine}-muon", engine, training=muon)
        # What one engine saved goes on in the other.
        before = directory / "ddp-muon" / "checkpoints" / "step_00000004"
        job("fsdp2-muon-on", "fsdp2", resume=str(before), training=muon)
    # One run handed from engine to engine every five steps; the last leg is one process.
    before = directory / "ddp" / "checkpoints" / "step_00000005"
    for step, engine in ((10, "zero3"), (15, "fsdp2"), (20, "zero2")):
        job(f"leg-{engine}", engine, resume=str(before))
        before = directory / f"leg-{engine}" / "checkpoints" / f"step_{step:08d}"
    for engine in ("ddp", "zero2", "zero3", "fsdp2"):
        training = {"max_steps": 8, "save_interval": 2, "eval_interval": 0, "max_skipped_steps": 1}
        job(f"{engine}-spoilt", engine, training=training, spoilt=(4, 5))
        job(f"{engine}-late", engine, training={"max_steps": 3, "save_interval": 1, "eval_interval": 0}, spoilt=(1,))
    file = tmp_path_factory.mktemp("jobs") / "jobs.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [*warm.torchrun(), str(WORKER), str(file)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return directory


@pytest.fixture(scope="module")
def alone(settings) -> Callable[..., Path]:
    """The same run in one process, whose batch is that of the two."""

    def train(name: str, resume: str | None = None, **changes: Any) -> Path:
        training = {"batch_size": 4, **changes.pop("training", {})}
        sections = settings(name, training=training, **changes)
        if not Path(sections["output_dir"]).exists():
            with torch.enable_grad():  # which the laws of inference go without
                fusiontree.train(sections, resume=resume)
        return Path(sections["output_dir"])

    return train


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_trains_as_one_process_does(runs: Path, alone, engine: str) -> None:
    one = alone("one")
    require_equal(rows(runs / engine), rows(one))
    kind = json.loads((runs / engine / "seen.json").read_text())["kind"]
    expected = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPHybridLanguageModel"}.get(engine, "DeepSpeedEngine")
    assert kind == expected
    found, wanted = (fusiontree.load(run, device="cpu").state_dict() for run in (runs / engine, one))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    gates = [
        [json.loads(line) for line in (run / "gates.jsonl").read_text().splitlines()] for run in (runs / engine, one)
    ]
    assert len(gates[0]) == len(gates[1]) == 5
    for record, other in zip(*gates, strict=True):
        assert record["tokens"] == other["tokens"]
        for layer, expected_layer in zip(record["layers"], other["layers"], strict=True):
            for name in ("mean", "std", "mamba_norm", "attention_norm"):
                assert layer[name] == pytest.approx(expected_layer[name], rel=1e-4), name


@pytest.mark.parametrize("engine", ENGINES)
def test_what_was_asked_for_is_what_ran(runs: Path, engine: str) -> None:
    seen = json.loads((runs / engine / "seen.json").read_text())
    assert seen["moments"] == pytest.approx(1.0 if engine == "ddp" else 0.5, rel=0.02)
    if engine not in ZERO:
        return
    stage, optimizer, parameters = ZERO[engine]
    assert (seen["stage"], seen["offload_optimizer"], seen["offload_param"]) == (stage, optimizer, parameters)
    assert seen["gradients are divided"] == (stage > 1) and seen["steps on host memory"] == (optimizer == "cpu")
    assert seen["parameters"] == (0.0 if engine == "offload" else 1.0)  # between two steps


@pytest.mark.parametrize("stage", [2, 3])
def test_the_shipped_deepspeed_files_run(runs: Path, stage: int) -> None:
    seen = json.loads((runs / f"zero{stage}-bf16" / "seen.json").read_text())
    assert (seen["stage"], seen["output"]) == (stage, "torch.bfloat16") and len(rows(runs / f"zero{stage}-bf16")) == 5


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_parameters_are_float32_and_compute_is_bf16_in_every_engine(runs: Path, alone, engine: str) -> None:
    seen = json.loads((runs / f"{engine}-bf16" / "seen.json").read_text())
    assert seen["output"] == "torch.bfloat16"
    assert {seen[name] for name in ("weight", "A_log", "D", "dt_bias")} == {"torch.float32"}
    assert json.loads((runs / engine / "seen.json").read_text())["output"] == "torch.float32"
    short = {"mixed_precision": "bf16", "max_steps": 5, "eval_interval": 0, "save_interval": 0, "warmup_steps": 0}
    expected = rows(alone("one-bf16", training=short))
    found = rows(runs / f"{engine}-bf16")
    for row, other in zip(found, expected, strict=True):
        assert row["lm_loss"] == pytest.approx(other["lm_loss"], rel=BF16_ROUNDING)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_branch_dropout_and_its_running_means_are_those_of_one_process(runs: Path, alone, engine: str) -> None:
    one = alone("one-dropped", training={"max_steps": 5, "eval_interval": 0}, model={"drop_branch_prob": 0.4})
    require_equal(rows(runs / f"{engine}-dropped"), rows(one))
    found, wanted = (fusiontree.load(run, device="cpu") for run in (runs / f"{engine}-dropped", one))
    for name, buffer in wanted.named_buffers():
        if name.endswith("_mean"):
            torch.testing.assert_close(dict(found.named_buffers())[name], buffer, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_cut_model_trains_as_in_one_process(runs: Path, alone, engine: str) -> None:
    one = alone("one-cut", training={"max_steps": 3, "eval_interval": 0}, model=CUT)
    require_equal(rows(runs / f"{engine}-cut"), rows(one))
    found, wanted = (fusiontree.load(run, device="cpu").state_dict() for run in (runs / f"{engine}-cut", one))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("engine", TAUGHT)
def test_distillation_is_that_of_one_process(runs: Path, alone, engine: str) -> None:
    taught = TAUGHT_LOSS | {"teacher": str(runs / "ddp" / "checkpoints" / "step_00000005")}
    one = alone("one-taught", training={"max_steps": 3, "eval_interval": 0}, loss=taught, model=TIED)
    expected = rows(one)
    distilled = rows(runs / f"{engine}-taught")
    require_equal(distilled, expected)
    for row, other in zip(distilled, expected, strict=True):
        assert row["distillation_loss"] == pytest.approx(other["distillation_loss"], rel=1e-5) and row["loss"] > 0
    found, wanted = (fusiontree.load(run, device="cpu").state_dict() for run in (runs / f"{engine}-taught", one))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-4, msg=name)


@needs_muon
@pytest.mark.parametrize("run", [*(f"{engine}-muon" for engine in TURNING), "fsdp2-muon-on"])
def test_muon_steps_in_two_processes_as_in_one(runs: Path, alone, run: str) -> None:
    """It turns matrices in bf16: the rounding of the gradients' sums comes out larger."""
    expected = rows(alone("one-muon", training={"max_steps": 8, "eval_interval": 0, "optimizer": "muon"}))
    found = rows(runs / run)
    assert [row["step"] for row in found] == [*range(5 if run == "fsdp2-muon-on" else 1, 9)]
    for row, other in zip(found, expected[-len(found) :], strict=True):
        assert row["lm_loss"] == pytest.approx(other["lm_loss"], rel=BF16_ROUNDING)
    assert expected[-1]["lm_loss"] < expected[0]["lm_loss"] - 0.2  # it learns


def test_a_run_goes_on_in_another_engine_and_with_another_number_of_processes(runs: Path, alone) -> None:
    one = rows(alone("one"))

    def require_end(run: Path, start: int) -> None:
        # In a new directory the step that it begins from is evaluated once more.
        require_equal([row for row in rows(run) if row["step"] > start], [row for row in one if row["step"] > start])

    for leg, start in (("leg-zero3", 5), ("leg-fsdp2", 10), ("leg-zero2", 15)):
        require_end(runs / leg, start)
    for source in ("leg-zero3", "leg-fsdp2"):
        require_end(alone(f"after-{source}", resume=str(runs / source / "checkpoints" / "step_00000015")), 15)


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_a_fault_in_one_process_takes_all_back_to_the_checkpoint(runs: Path, engine: str) -> None:
    """Step 4 fails in one of two processes and is left out, 5 leads back to step 4 and fails again."""
    logged = rows(runs / f"{engine}-spoilt")
    assert [row["step"] for row in logged] == list(range(1, 9))
    assert [row["loss"] is None for row in logged] == [step in (4, 5) for step in range(1, 9)]
    assert [row["skipped_steps"] for row in logged] == [0, 0, 0, 1, 3, 3, 3, 3]
    require_equal(logged[:3] + logged[5:], [row for row in rows(runs / "ddp-spoilt") if row["step"] not in (4, 5)])


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_checkpoint_from_before_the_first_finite_step_goes_on(runs: Path, alone, engine: str) -> None:
    run = runs / f"{engine}-late"
    assert "error" not in json.loads((run / "seen.json").read_text())
    late = {"max_steps": 3, "eval_interval": 0}
    one = alone(f"after-{engine}-late", resume=str(run / "checkpoints" / "step_00000001"), training=late)
    require_equal(rows(run)[1:], rows(one))
