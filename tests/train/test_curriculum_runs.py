"""Runs with a length curriculum: what a user sees of it, and that a stop anywhere changes nothing."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stopped_runs import final, halt_after, rows, stop

import fusiontree
import warm
from fusiontree.cli import main
from fusiontree.errors import InputError
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings, as_run_settings

# Rows of 24 tokens, 2 in a micro-batch, 2 micro-batches in a step: 96 tokens.
STAGES = [{"length": 8, "steps": 3}, {"length": 16, "tokens": 300}, {"length": 6, "steps": 1}]
LENGTHS = [8, 8, 8, 16, 16, 16, 16, 6, 24, 24, 24]


def train_rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run, "metrics.jsonl") if "lm_loss" in row]


def test_a_run_goes_through_its_stages(run_settings, tmp_path: Path) -> None:
    sections = run_settings(
        curriculum={"stages": STAGES},
        training={"max_steps": len(LENGTHS), "eval_interval": 4, "eval_batches": None},
        logging={"progress": "plain"},
        output_dir=str(tmp_path / "run"),
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(sections))
    done = subprocess.run(
        [warm.python(), "-m", "fusiontree", "train", "--config", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rows of 8 tokens to step 3, 16 tokens to step 7, 6 tokens to step 8, then 24" in done.stderr
    shown = [line.split()[-3] for line in done.stderr.splitlines() if line.startswith("step ") and "ETA" in line]
    assert shown == [str(length) for length in LENGTHS]

    found = train_rows(tmp_path / "run")
    assert [row["length"] for row in found] == LENGTHS
    assert [row["tokens"] for row in found] == [96 * step for step in range(1, len(LENGTHS) + 1)]
    evaluations = [row for row in rows(tmp_path / "run", "metrics.jsonl") if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 11]
    assert all("length" not in row for row in evaluations)

    # Evaluation reads rows of the full length: the same of an untrained model as without a curriculum.
    plain = run_settings(
        training={"max_steps": 1, "eval_batches": None},
        output_dir=str(tmp_path / "plain"),
        logging={"progress": "none"},
    )
    fusiontree.train(plain)
    untrained = rows(tmp_path / "plain", "metrics.jsonl")[0]
    assert evaluations[0] == untrained
    assert "length" not in train_rows(tmp_path / "plain")[0]

    # The resolved configuration says the same.
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert RunSettings.parse(resolved).length_schedule() == RunSettings.parse(sections).length_schedule()


def test_stopped_once_and_killed_once_is_never_stopped(run_settings, tmp_path: Path) -> None:
    steps = 36
    changes = {
        "model": {"dropout": 0.1, "drop_branch_prob": 0.3},
        "curriculum": {"preset": "aggressive"},
        "training": {
            "max_steps": steps,
            "max_seq_length": 128,
            "batch_size": 1,
            "eval_interval": 10,
            "save_interval": 4,
        },
        "logging": {"progress": "plain"},
    }
    fusiontree.train(run_settings(**changes, output_dir=str(tmp_path / "straight")))
    stopped = run_settings(**changes, output_dir=str(tmp_path / "stopped"))
    run = tmp_path / "stopped"
    seed = time.time_ns() % 10_000
    draw = random.Random(seed)
    # Stages end at steps 7, 16 and 25; one stop lets the workers end, the other has none.
    plan = [
        (1, signal.SIGTERM, 143, draw.randint(1, 17)),
        (0, signal.SIGKILL, -signal.SIGKILL, draw.randint(20, 27)),
    ]
    for num_workers, number, expected_code, step in plan:
        with_workers = stopped | {"data": stopped["data"] | {"num_workers": num_workers}}
        code, errors = stop(with_workers, run, number, step)
        assert code == expected_code, f"seed {seed}: {plan}\n{errors}"
    assert fusiontree.train(stopped, resume="auto").step == steps

    found = train_rows(run)
    assert [row["length"] for row in found] == [16] * 7 + [32] * 9 + [64] * 9 + [128] * 11
    for name in ("metrics.jsonl", "gates.jsonl"):
        assert rows(run, name) == rows(tmp_path / "straight", name), f"seed {seed}: {plan}"
    expected, tensors = final(tmp_path / "straight"), final(run)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_a_stop_at_every_step_changes_nothing(run_settings, tmp_path: Path) -> None:
    """Within stages and at their ends; a row of metrics spans stops and stages."""
    directories = tmp_path / "straight", tmp_path / "stopped"
    steps = len(LENGTHS)
    for directory, ends in zip(directories, ([steps], range(1, steps + 1)), strict=True):
        for end in ends:
            settings = run_settings(
                curriculum={"stages": STAGES},
                training={"max_steps": steps, "log_interval": 4, "eval_interval": 0, "save_interval": 0},
                output_dir=str(directory),
            )
            engine = TrainingEngine(RunSettings.parse(settings), resume="auto")
            halt_after(engine, end)
            assert engine.run().step == end
    assert rows(directories[1], "metrics.jsonl") == rows(directories[0], "metrics.jsonl")
    assert [row["length"] for row in train_rows(directories[1])] == [16, 6, 24]  # of the last step of each row
    expected, found = (final(directory) for directory in directories)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_curriculum_of_one_stage_as_long_as_the_run_is_a_run_of_that_shape(run_settings, tmp_path: Path) -> None:
    """The shape of the batches is all that a stage changes."""
    loss = {"load_balance_coeff": 0.0}
    fusiontree.train(
        run_settings(
            curriculum={"stages": [{"length": 16, "steps": 6}]},
            training={"eval_interval": 0},
            loss=loss,
            output_dir=str(tmp_path / "stage"),
        )
    )
    shape = {"batch_size": 3, "max_seq_length": 16, "eval_interval": 0}
    fusiontree.train(run_settings(training=shape, loss=loss, output_dir=str(tmp_path / "shape")))
    staged = [{key: value for key, value in row.items() if key != "length"} for row in train_rows(tmp_path / "stage")]
    assert staged == train_rows(tmp_path / "shape")
    expected, found = final(tmp_path / "shape"), final(tmp_path / "stage")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_curriculum_given_on_the_command_line_and_a_dry_run(
    run_settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_settings(output_dir=str(tmp_path / "run"))))
    given = "curriculum.stages=[{length: 8, steps: 2}, {length: 12, tokens: 192}]"
    assert main(["train", "--config", str(config), "--dry-run", given]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "96 tokens per optimizer step on 1 device(s)" in shown
    assert "rows of 8 tokens to step 2, 12 tokens to step 4, then 24; at most 24, the same tokens at every" in shown
    assert main(["train", "--config", str(config), "--dry-run"]) == 0
    assert "rows of" not in capsys.readouterr().out
    assert main(["train", "--config", str(config), given]) == 0
    assert [row["length"] for row in train_rows(tmp_path / "run")] == [8, 8, 12, 12, 24, 24]
    resolved = json.loads((tmp_path / "run" / "manifest.json").read_text())["config"]
    assert [stage["length"] for stage in resolved["curriculum"]["stages"]] == [8, 12]


def test_data_inspect_shows_a_row_of_the_first_stage(
    run_settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_settings(curriculum={"stages": STAGES})))
    for split, length in (("train", 8), ("eval", 24)):
        assert main(["data", "inspect", str(config), "--split", split]) == 0
        assert f"the first packed row: {length} tokens" in capsys.readouterr().out


def test_a_stage_that_does_not_fit_is_told_with_the_line_of_the_file(
    run_settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("training: {max_seq_length: 24, batch_size: 2}\ncurriculum:\n  stages: [{length: 7, steps: 2}]\n")
    assert main(["train", "--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {config}, line 3: curriculum.stages.0.length: no whole number of rows of 7 tokens")
    assert line.endswith("= 48 tokens: use 6 or 8")


def test_best_fit_and_a_curriculum_are_refused_before_anything_is_made(run_settings) -> None:
    sections = run_settings(data={"packing": "best_fit"}, curriculum={"stages": [{"length": 12, "steps": 2}]})
    with pytest.raises(InputError, match="best_fit makes rows of one length"):
        as_run_settings(sections)
