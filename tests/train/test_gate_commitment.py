"""Gates that are let go late in training decide, and the log says when."""

from __future__ import annotations

from pathlib import Path

import pytest
from stopped_runs import rows

import fusiontree
from fusiontree.train.settings import RunSettings


def test_gates_that_are_let_go_decide(run_settings, tmp_path: Path) -> None:
    logged = {}
    for name, loss in (("held", {}), ("let go", {"commit_from": 0.25, "commit_coeff": 3.0})):
        training = {"max_steps": 40, "learning_rate": 2e-2, "min_lr_ratio": 1.0, "eval_interval": 0}
        fusiontree.train(run_settings(training=training, loss=loss, output_dir=str(tmp_path / name)))
        logged[name] = rows(tmp_path / name, "metrics.jsonl")
    held, free = logged["held"], logged["let go"]
    weights = ("load_balance_coeff", "entropy_coeff")
    assert [row["loss"] for row in held[:10]] == [row["loss"] for row in free[:10]]  # nothing happens before
    assert free[-1]["entropy_loss"] > held[-1]["entropy_loss"] + 0.02  # minus the entropy: it has fallen
    assert not set(weights) & set(held[0])
    assert [free[-1][name] for name in weights] == pytest.approx([0.0, -3.0])
    assert [free[24][name] for name in weights] == pytest.approx([0.025, 1.5e-4 - 1.5])
    for row in free:
        expected = row["lm_loss"] + sum(
            row[f"{term}_coeff"] * row[f"{term}_loss"] for term in ("load_balance", "entropy")
        )
        assert row["loss"] == pytest.approx(expected)


def test_a_weight_that_nothing_reads_is_told() -> None:
    with pytest.raises(fusiontree.InputError, match="commit_coeff has no effect without commit_from"):
        RunSettings.parse({"loss": {"commit_coeff": 1.0}})
