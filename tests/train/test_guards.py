"""Faults in the middle of training: what is not finite changes nothing, and what cannot be saved costs only itself."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusiontree
from fusiontree.errors import InputError
from fusiontree.train import saving
from fusiontree.train.checkpoint import load_moments, load_state
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings
from tiny_models import needs_muon

STEPS = 8


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def engine_with_faults(sections: dict[str, Any], is_faulty: Callable[[int], bool]) -> TrainingEngine:
    """An engine in which the second layer's attention gives NaN while it trains the steps that are faulty."""
    engine = TrainingEngine(RunSettings.parse(sections))
    attention = engine.parallel.module.layers[1].attention

    def spoil(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return output * float("nan") if module.training and is_faulty(engine.step + 1) else output

    attention.register_forward_hook(spoil)
    return engine


def test_a_step_that_is_not_finite_changes_no_weight(run_settings, tmp_path: Path, capsys) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"max_steps": STEPS, "save_interval": 1, "save_total_limit": None, "eval_interval": 0},
        logging={"progress": "plain"},
    )
    engine_with_faults(sections, lambda step: step == 4).run()
    run = tmp_path / "run"
    before, after, later = (
        fusiontree.load(run / "checkpoints" / f"step_0000000{step}", device="cpu").state_dict() for step in (3, 4, 5)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in after)
    assert [row["skipped_steps"] for row in rows(run)] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert rows(run)[3]["loss"] is None and rows(run)[4]["loss"] > 0
    assert "step 4 is not finite (lm nan" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=needs_muon)])
def test_a_run_is_saved_before_its_first_finite_step(run_settings, tmp_path: Path, optimizer: str) -> None:
    """Steps that are left out count, and moments come with the first that is not."""
    training = {"max_steps": 4, "save_interval": 1, "save_total_limit": None, "eval_interval": 0}
    sections = run_settings(output_dir=str(tmp_path / "run"), training=training | {"optimizer": optimizer})
    engine_with_faults(sections, lambda step: step == 1).run()
    first = tmp_path / "run" / "checkpoints" / "step_00000001"
    moments = load_moments(first)
    assert moments["step"] == 0 and not any(moments[name].any() for name in moments)
    again = run_settings(output_dir=str(tmp_path / "again"), training=sections["training"])
    fusiontree.train(again, resume=str(first))
    assert [row["loss"] for row in rows(tmp_path / "again")] == [row["loss"] for row in rows(tmp_path / "run")[1:]]
    last = [tmp_path / name / "checkpoints" / "step_00000004" for name in ("run", "again")]
    assert load_moments(last[1])["step"] == 3
    found, expected = (fusiontree.load(path, device="cpu").state_dict() for path in last)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_it_goes_back_once_and_then_stops_with_the_layer(run_settings, tmp_path: Path) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"max_steps": 20, "save_interval": 4, "eval_interval": 0, "max_skipped_steps": 2},
    )
    faulty: list[int] = []
    engine = engine_with_faults(sections, lambda step: step >= 5 and not faulty.append(step))
    with pytest.raises(InputError, match=r"first in the output of layers\.1\.attention, training stopped") as caught:
        engine.run()
    assert "step_00000004" in str(caught.value)
    # Steps 5 to 7, back to 4, 5 to 7 once more, and the last of them again, counted by then, to find the layer.
    assert list(dict.fromkeys(faulty)) == [5, 6, 7, 8] and engine.step == 7
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_having_gone_back_it_goes_on_with_other_text(run_settings, tmp_path: Path) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"max_steps": STEPS, "save_interval": 3, "eval_interval": 0, "max_skipped_steps": 1},
    )
    left = [5, 6]  # each step fails once
    engine = engine_with_faults(sections, lambda step: step in left)
    judge = engine.guard.left_out

    def left_out() -> str:
        left.remove(engine.step)
        return judge()

    engine.guard.left_out = left_out  # type: ignore[method-assign]
    result = engine.run()
    assert result.step == STEPS
    logged = rows(tmp_path / "run")
    assert [row["step"] for row in logged] == list(range(1, STEPS + 1))
    straight = run_settings(output_dir=str(tmp_path / "straight"), training=sections["training"])
    fusiontree.train(straight)
    expected = rows(tmp_path / "straight")
    assert [row["loss"] for row in logged[:3]] == [row["loss"] for row in expected[:3]]
    assert logged[3]["loss"] != expected[3]["loss"]  # step 4 was read before the fault: it is not read again


def test_a_spike_is_reported(run_settings, tmp_path: Path, capsys) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"max_steps": 40, "eval_interval": 0, "learning_rate": 1e-5, "save_interval": 0},
        logging={"progress": "plain"},
    )
    engine = TrainingEngine(RunSettings.parse(sections))
    head = engine.parallel.module.lm_head

    def spoil(module: torch.nn.Module, arguments: Any) -> None:
        if module.training and engine.step + 1 == 35:
            head.weight.data.mul_(-30)
        elif module.training and engine.step + 1 == 36:
            head.weight.data.div_(-30)

    engine.parallel.module.register_forward_pre_hook(spoil)
    engine.run()
    reported = [line for line in capsys.readouterr().err.splitlines() if "is a spike" in line]
    assert any(line.startswith("step 35: loss ") and "standard deviations" in line for line in reported)
    counted = [row["spikes"] for row in rows(tmp_path / "run")]
    assert counted[33:35] == [0, 1] and counted[-1] == len(reported)
    assert load_state(tmp_path / "run" / "latest").guard["spikes"] == len(reported)  # a resumed run counts on


def test_the_best_checkpoint_is_kept(run_settings, tmp_path: Path) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        # So fast that it soon gets worse.
        training={
            "max_steps": 12,
            "learning_rate": 0.3,
            "eval_interval": 1,
            "save_interval": 0,
            "save_total_limit": 1,
            "save_best": True,
            "warmup_steps": 8,
            "min_lr_ratio": 1.0,
        },
    )
    fusiontree.train(sections)
    run = tmp_path / "run"
    losses = {row["step"]: row["eval_loss"] for row in rows(run) if "eval_loss" in row and row["step"] > 0}
    best = min(losses, key=losses.__getitem__)
    assert best < 12, "the run must get worse for this test to tell anything"
    assert (run / "best").resolve().name == f"step_{best:08d}"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step_{best:08d}", "step_00000012"}


def test_a_checkpoint_that_cannot_be_saved_costs_only_itself(run_settings, tmp_path: Path, capsys, monkeypatch) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"max_steps": 6, "save_interval": 2, "eval_interval": 0},
        logging={"progress": "plain"},
    )
    replace = os.replace
    rename = os.rename

    def full(source: Any, destination: Any, *more: Any) -> None:
        if str(destination).endswith("step_00000004"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))
        (rename if Path(source).is_dir() else replace)(source, destination, *more)

    monkeypatch.setattr(os, "rename", full)
    fusiontree.train(sections)
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints == ["step_00000002", "step_00000006"]
    shown = capsys.readouterr().err
    assert "step_00000004 could not be saved: No space left on device; free some space" in shown
    assert "step_00000002 is whole" in shown and "training goes on" in shown


@pytest.mark.parametrize("failing", ["point", "drop_old", "prune_plan.json"])
def test_what_follows_a_checkpoint_costs_only_itself(
    run_settings, tmp_path: Path, capsys, monkeypatch, failing: str
) -> None:
    training = {"max_steps": 4, "save_interval": 2, "save_total_limit": 1, "eval_interval": 2, "save_best": True}
    sections = run_settings(output_dir=str(tmp_path / "run"), training=training, logging={"progress": "plain"})
    if failing == "prune_plan.json":
        (tmp_path / "run" / failing).mkdir(parents=True)  # no file can take its place
    else:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(saving, failing, full)
    result = fusiontree.train(sections)
    assert result.step == 4 and result.checkpoint is not None and result.checkpoint.name == "step_00000004"
    shown = capsys.readouterr().err
    assert "step_00000002 is saved, but " in shown and "step_00000004 is saved, but " in shown
    assert "could not be saved" not in shown
    assert (tmp_path / "run" / "best").exists() == (failing != "point")
    if failing != "drop_old":
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000004"]
