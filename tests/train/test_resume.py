"""A run that is stopped and killed at random steps ends exactly as one that never was (law 10)."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stopped_runs import final, halt_after, rows, stop

import fusiontree
from fusiontree.artifacts import RunManifest
from fusiontree.deploy.heal import heal, heal_settings
from fusiontree.errors import InputError
from fusiontree.train.checkpoint import load_state
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings
from tiny_models import needs_muon, save_tiny_model


def test_stopped_and_killed_at_random_steps(run_settings, tmp_path: Path) -> None:
    steps = 40
    changes = {
        # Everything that draws or accumulates is on: dropout, branch dropout, shuffling, rows over several steps.
        "model": {"dropout": 0.1, "drop_branch_prob": 0.3},
        "training": {"max_steps": steps, "log_interval": 1, "eval_interval": 13, "save_interval": 5},
        "loss": {"gate_margin": 0.0, "load_balance_coeff": 0.3},
        "gate_monitor": {"interval": 3, "plan_min_steps": 0},
        "logging": {"progress": "plain"},
    }
    straight = run_settings(**changes, output_dir=str(tmp_path / "straight"))
    fusiontree.train(straight)
    stopped = run_settings(**changes, output_dir=str(tmp_path / "stopped"))
    run = Path(stopped["output_dir"])

    seed = time.time_ns() % 10_000
    draw = random.Random(seed)
    first, second = draw.randint(1, 12), draw.randint(18, 30)
    polite, expected_code = draw.choice([(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    plan = f"seed {seed}: {polite.name} after step {first}, SIGKILL after step {second}"
    code, errors = stop(stopped, run, polite, first)
    assert code == expected_code, f"{plan}\n{errors}"
    assert "go on with: fusiontree train --config" in errors and f"{polite.name}: stopped after step" in errors
    assert f"{polite.name}: saving after this step; once more ends at once" in errors
    interrupted_at = int((run / "latest").resolve().name.removeprefix("step_"))
    assert first <= interrupted_at < steps
    assert len([row for row in rows(run, "metrics.jsonl") if "lm_loss" in row]) == interrupted_at
    code, errors = stop(stopped, run, signal.SIGKILL, second)
    assert code == -signal.SIGKILL, f"{plan}\n{errors}"
    (run / "checkpoints" / ".step_00000099.0.tmp").mkdir()  # as a kill in the middle of saving leaves one
    result = fusiontree.train(stopped, resume="auto")

    assert result.step == steps
    assert not list((run / "checkpoints").glob(".*"))
    for name in ("metrics.jsonl", "gates.jsonl"):
        assert rows(run, name) == rows(tmp_path / "straight", name)
    expected, found = final(tmp_path / "straight"), final(run)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    plans = [json.loads((directory / "prune_plan.json").read_text()) for directory in (tmp_path / "straight", run)]
    assert plans[0]["layers"] == plans[1]["layers"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_row_of_metrics_may_span_a_stop(run_settings, tmp_path: Path, precision: str) -> None:
    """Three stops by `max_steps`, none of them where a row or an evaluation ends; same schedule throughout."""
    training = {"log_interval": 4, "eval_interval": 5, "save_interval": 0, "warmup_steps": 100}
    training["mixed_precision"] = precision
    directories = tmp_path / "straight", tmp_path / "stopped"
    for directory, ends in zip(directories, ([9], [2, 3, 7, 9]), strict=True):
        for max_steps in ends:
            # The learning rate is still warming up, so that max_steps does not bend it; the last step logs anyway.
            loss = {"commit_from": 0.2, "commit_coeff": 0.3}  # whose weights change from step to step
            settings = run_settings(training=training | {"max_steps": 9}, loss=loss, output_dir=str(directory))
            engine = TrainingEngine(RunSettings.parse(settings), resume="auto")
            halt_after(engine, max_steps)
            engine.run()
    assert rows(directories[1], "metrics.jsonl") == rows(directories[0], "metrics.jsonl")
    expected, found = (final(directory) for directory in directories)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@needs_muon
@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_every_schedule_and_muon_go_on_exactly(run_settings, tmp_path: Path, schedule: str) -> None:
    training = {"optimizer": "muon", "lr_schedule": schedule, "lr_decay_ratio": 0.5, "max_steps": 8}
    training |= {"save_interval": 3, "eval_interval": 0}
    straight, stopped = (run_settings(training=training, output_dir=str(tmp_path / name)) for name in ("one", "two"))
    fusiontree.train(straight)
    engine = TrainingEngine(RunSettings.parse(stopped))
    halt_after(engine, 5)
    assert engine.run().step == 5
    assert fusiontree.train(stopped, resume="auto").step == 8
    assert rows(tmp_path / "two", "metrics.jsonl") == rows(tmp_path / "one", "metrics.jsonl")
    expected, found = final(tmp_path / "one"), final(tmp_path / "two")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(InputError, match=r"exp_avg has none; training\.optimizer must be what it was"):
        other = run_settings(training=training | {"optimizer": "adamw", "max_steps": 9}, output_dir=str(tmp_path / "3"))
        fusiontree.train(other, resume=str(tmp_path / "one"))


def test_resuming_from_an_older_checkpoint_drops_what_came_after(run_settings, tmp_path: Path) -> None:
    sections = run_settings(training={"max_steps": 6, "save_interval": 2}, output_dir=str(tmp_path / "run"))
    fusiontree.train(sections)
    run = tmp_path / "run"
    before = rows(run, "metrics.jsonl"), rows(run, "gates.jsonl"), final(run)
    fusiontree.train(sections, resume=str(run / "checkpoints" / "step_00000002"))
    assert (rows(run, "metrics.jsonl"), rows(run, "gates.jsonl")) == before[:2]
    assert all(torch.equal(tensor, final(run)[name]) for name, tensor in before[2].items())


def test_a_run_can_start_from_another_runs_checkpoint(run_settings, tmp_path: Path) -> None:
    sections = run_settings(training={"max_steps": 3, "eval_interval": 0}, output_dir=str(tmp_path / "first"))
    fusiontree.train(sections)
    child = run_settings(training={"max_steps": 5, "eval_interval": 0}, output_dir=str(tmp_path / "second"))
    assert fusiontree.train(child, resume=str(tmp_path / "first")).step == 5
    assert [row["step"] for row in rows(tmp_path / "second", "metrics.jsonl")] == [4, 5]
    manifest = json.loads((tmp_path / "second" / "manifest.json").read_text())
    assert manifest["parent_run"].endswith("step_00000003")


def test_healing_a_cut_model_goes_on_exactly(run_settings, tmp_path: Path) -> None:
    """Of every kind of layer that only a cut leaves: one vector, merged maps, folded gates, fewer heads."""
    fields = {"mlp": "aligned", "num_layers": 4, "global_heads": 1, "vocab_size": 300}
    cut = {
        "layer_branches": ["both", "mamba", "attention", "constant"],
        "layer_gates": [True, False, False, True],
        "layer_merges": ["none", "z", "hz", "none"],
        "layer_heads": [{"mamba": 3, "local": 2}, None, None, None],
    }
    tokenizer = Path(run_settings()["data"]["tokenizer"])
    parent = save_tiny_model(tmp_path / "parent", tokenizer, **fields)
    export = save_tiny_model(tmp_path / "cut", tokenizer, **fields, **cut)
    training = {"max_steps": 6, "save_interval": 0, "eval_interval": 6, "eval_batches": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(run_settings(training=training)))

    def settings(name: str) -> RunSettings:
        overrides = ["training.max_steps=6", f"output_dir={tmp_path / name}"]
        return heal_settings(export, parent=parent, config=config, overrides=overrides)

    heal(settings("straight"))
    engine = TrainingEngine(settings("stopped"))
    halt_after(engine, 3)
    assert engine.run().step == 3
    assert heal(settings("stopped"), resume="auto").report is not None
    assert rows(tmp_path / "stopped", "metrics.jsonl") == rows(tmp_path / "straight", "metrics.jsonl")
    expected, found = final(tmp_path / "straight"), final(tmp_path / "stopped")
    before = load_file(export / "model.safetensors")
    assert found.keys() == expected.keys() >= before.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not torch.equal(found["layers.3.constant"], before["layers.3.constant"])


@pytest.mark.parametrize("removed", [(), ("mlp",), ("mlp", "layer_heads", "layer_merges")])
def test_a_run_from_before_there_was_a_choice_of_mlp_goes_on(run_settings, tmp_path: Path, removed: tuple) -> None:
    run = tmp_path / "run"
    sections = run_settings(model={"mlp": "aligned"}, training={"max_steps": 2}, output_dir=str(run))
    fusiontree.train(sections)
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["mlp"] == "aligned"
    resolved["model"] = {name: value for name, value in resolved["model"].items() if name not in removed}
    resolved["training"]["max_steps"] = 3
    assert fusiontree.train(resolved, resume="auto").step == 3
    again = {**resolved, "output_dir": str(tmp_path / "again")}
    fusiontree.train(again)
    assert fusiontree.load(tmp_path / "again" / "latest", device="cpu").config.mlp == "aligned"
    del sections["model"]["mlp"]
    sections["training"]["max_steps"] = 4
    with pytest.raises(InputError, match="trained with model.mlp aligned, .* asks for residual: set model.mlp=aligned"):
        fusiontree.train(sections, resume="auto")


def test_the_manifest_tells_of_every_resume(run_settings, tmp_path: Path, monkeypatch) -> None:
    """Another commit, other settings: what the run began with stays beside what it went on with."""
    sections = run_settings(training={"max_steps": 2, "save_interval": 2}, output_dir=str(tmp_path / "run"))
    fusiontree.train(sections)
    path = tmp_path / "run" / "manifest.json"
    began = RunManifest.load(path)
    assert began.resumes == []
    monkeypatch.setattr("fusiontree.artifacts.git_revision", lambda: "another")
    monkeypatch.setattr("sys.argv", ["fusiontree", "train", "--resume", "auto"])
    for last in (4, 6):
        sections["training"] |= {"max_steps": last, "weight_decay": 0.05 * last}
        fusiontree.train(sections, resume="auto")
    now = RunManifest.load(path)
    assert now.model_copy(update={"resumes": []}) == began
    assert [(resume.step, Path(resume.checkpoint).name) for resume in now.resumes] == [
        (2, "step_00000002"),
        (4, "step_00000004"),
    ]
    assert now.resumes[1].changed == {"training.max_steps": 6, "training.weight_decay": pytest.approx(0.3)}
    assert now.resumes[0].git_revision == "another" != began.git_revision
    assert now.resumes[0].command == "fusiontree train --resume auto" and now.resumes[0].versions == began.versions
    assert now.resumes[0].data_fingerprint == began.data_fingerprint
    checkpoints = tmp_path / "run" / "checkpoints"
    kept = [RunManifest.load(checkpoints / f"step_0000000{n}" / "training_state" / "manifest.json") for n in (2, 4, 6)]
    assert [len(manifest.resumes) for manifest in kept] == [0, 1, 2]


def stop_in_evaluation(engine: TrainingEngine, step: int) -> None:
    """Deliver SIGTERM to this process when the engine begins to evaluate `step`."""
    measure = engine.evaluation.measure

    def stopped(*arguments: Any) -> Any:
        if engine.step == step:
            signal.raise_signal(signal.SIGTERM)
        return measure(*arguments)

    engine.evaluation.measure = stopped  # type: ignore[method-assign]


def test_an_evaluation_that_is_made_up_for_can_be_the_best(run_settings, tmp_path: Path) -> None:
    training = {"max_steps": 9, "eval_interval": 2, "save_interval": 1, "save_total_limit": 1, "save_best": True}
    run = tmp_path / "run"
    settings = RunSettings.parse(run_settings(training=training, output_dir=str(run)))
    engine = TrainingEngine(settings)
    stop_in_evaluation(engine, 4)
    assert engine.run().step == 4
    assert (run / "best").resolve().name == "step_00000002"
    engine = TrainingEngine(settings, resume="auto")
    halt_after(engine, 5)
    assert engine.run().step == 5
    losses = {row["step"]: row["eval_loss"] for row in rows(run, "metrics.jsonl") if "eval_loss" in row}
    assert losses[4] < losses[2], "step 4 must be the best for this test to tell anything"
    assert (run / "best").resolve().name == "step_00000004"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000004", "step_00000005"]
    # Killed right after its evaluation, a run would know of it.
    assert load_state(run / "best").best == {"step": 4, "loss": losses[4]}


def test_an_evaluation_that_was_cut_in_several_processes_is_made_up_for(run_settings, tmp_path: Path) -> None:
    """The loop of two processes in one, whose sums are its own."""
    training = {"max_steps": 6, "eval_interval": 3, "save_interval": 0}
    settings = RunSettings.parse(run_settings(training=training, output_dir=str(tmp_path / "run")))
    engine = TrainingEngine(settings)
    engine.processes.count = 2
    stop_in_evaluation(engine, 3)
    assert engine.run().step == 3
    TrainingEngine(settings, resume="auto").run()
    evaluated = [row["step"] for row in rows(tmp_path / "run", "metrics.jsonl") if "eval_loss" in row]
    assert evaluated == [0, 3, 6]
