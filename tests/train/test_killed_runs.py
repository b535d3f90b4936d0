"""Training that is killed at random steps, in every data mode, and what comes of a server that goes away."""

from __future__ import annotations

import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from stopped_runs import final, rows, stop

import fusiontree
from fusiontree.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from http_files import Fault, file_server

STEPS = 40
MODES = ["lazy", "static", "hf_streaming"]


def sections_of(run_settings, corpus: Path, tmp_path: Path, mode: str, name: str) -> dict[str, Any]:
    sections = run_settings(
        training={"max_steps": STEPS, "log_interval": 1, "eval_interval": 0, "save_interval": 3},
        output_dir=str(tmp_path / name),
    )
    sections["data"] |= {
        "data_mode": mode,
        "static_dir": str(tmp_path / "tokens"),
        "shuffle_block": 16,
        "needle_in_haystack_prob": 0.2,
        "structured_task_prob": 0.2,
        "packing": "best_fit" if mode == "static" else "concatenate",
        "num_workers": 1 if mode == "lazy" else 0,
    }
    if mode == "static":
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(sections))
        assert main(["data", "tokenise", str(path), "--processes", "1"]) == 0
    return sections


def kill_often(run_settings, corpus: Path, tmp_path: Path, mode: str, kills: int) -> None:
    straight = sections_of(run_settings, corpus, tmp_path, mode, "straight")
    fusiontree.train(straight)
    killed = sections_of(run_settings, corpus, tmp_path, mode, "killed")
    run = Path(killed["output_dir"])
    seed = time.time_ns() % 10_000
    at = sorted(random.Random(seed).choices(range(1, STEPS - 2), k=kills))
    for step in at:
        code, errors = stop(killed, run, signal.SIGKILL, step)
        assert code == -signal.SIGKILL, f"seed {seed}, killed after steps {at}\n{errors}"
    result = fusiontree.train(killed, resume="auto")
    assert result.step == STEPS
    assert rows(run, "metrics.jsonl") == rows(tmp_path / "straight", "metrics.jsonl"), f"seed {seed}, steps {at}"
    expected, found = final(tmp_path / "straight"), final(run)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("mode", ["static", "hf_streaming"])
def test_a_killed_run_ends_as_one_that_never_was(run_settings, corpus: Path, tmp_path: Path, mode: str) -> None:
    kill_often(run_settings, corpus, tmp_path, mode, kills=1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_that_is_killed_ten_times(run_settings, corpus: Path, tmp_path: Path, mode: str) -> None:
    kill_often(run_settings, corpus, tmp_path, mode, kills=10)


def test_a_failing_server_changes_no_loss_and_one_that_stays_down_leaves_a_good_checkpoint(
    run_settings, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (corpus / "train.jsonl").read_bytes()
    local = sections_of(run_settings, corpus, tmp_path, "hf_streaming", "local")
    local["training"]["max_steps"] = 20
    fusiontree.train(local)
    with file_server() as server:
        faults = [Fault("end", 700), Fault(status=500), Fault("drop", 2000), Fault("end", 100)]
        url = server.add("train.jsonl", content, faults=faults)
        served = sections_of(run_settings, corpus, tmp_path, "hf_streaming", "served")
        served["data"] |= {"train_paths": url, "stream_timeout": 2.0}
        config = tmp_path / "served.yaml"
        config.write_text(yaml.safe_dump(served))
        assert main(["train", "--config", str(config), "training.max_steps=20"]) == 0
        assert len(server.requests) > 4
        assert rows(tmp_path / "served", "metrics.jsonl") == rows(tmp_path / "local", "metrics.jsonl")
        server.add("train.jsonl", content, always=Fault(status=503))
    capsys.readouterr()
    code = main(["train", "--config", str(config), "training.max_steps=30", "data.stream_tries=1", "--resume", "auto"])
    assert code == 2
    assert "train.jsonl cannot be read" in capsys.readouterr().err
    assert fusiontree.load(tmp_path / "served").config.num_layers == 2
