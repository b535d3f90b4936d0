"""`fusiontree gates`: a table, two heat maps, a record; and what it says where there is nothing to show."""

from __future__ import annotations

import json
import math
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

import fusiontree
from fusiontree.artifacts import GateStatistics
from fusiontree.cli import main


@pytest.fixture(scope="module")
def finished(run_settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps whose last layer has no attention."""
    run = tmp_path_factory.mktemp("gates") / "run"
    model = {"num_layers": 3, "layer_branches": ["both", "both", "mamba"]}
    fusiontree.train(run_settings(model=model, training={"eval_interval": 0}, output_dir=str(run)))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def test_the_table_shows_every_layer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates", str(run)]) == 0
    shown = capsys.readouterr().out
    for head in ("layer", "branches", "mean", "std", "50%", "entropy", "<0.05 >0.95", "‖mamba‖", "‖attention‖"):
        assert head in shown
    assert "Gates at step 6" in shown
    assert shown.count("both") == 2 and shown.count("–") >= 8  # the pruned layer has a row without numbers
    record = GateStatistics.load(run / "gates.json")
    assert record.step == 6 and [layer.branches for layer in record.layers] == ["both", "both", "mamba"]
    assert f"{record.layers[0].mean:.3f}" in shown
    assert math.isnan(record.layers[2].mean)


@pytest.mark.parametrize("checkpoint", ["latest", "checkpoints/step_00000006"])
def test_a_checkpoint_stands_for_its_run(run: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates", str(run / checkpoint)]) == 0
    assert "Gates at step 6" in capsys.readouterr().out
    assert (run / "gates.json").is_file() and not (run / checkpoint / "gates.json").exists()


def test_an_earlier_checkpoint_shows_what_was_recorded_until_then(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gates", str(run / "checkpoints" / "step_00000003")]) == 0
    assert "Gates at step 2" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["checkpoints/step_00000099", "no/such"])
def test_a_path_that_is_not_there_is_no_checkpoint(run: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates", str(run / path)]) == 2
    assert f"run directory {run / path} does not exist" in capsys.readouterr().err
    assert not (run / "gates.json").exists()


def test_the_heat_maps_are_pictures(run: Path) -> None:
    shutil.rmtree(run / "plots", ignore_errors=True)
    assert main(["gates", str(run)]) == 0
    for name in ("gates_by_step.png", "gates_by_channel.png"):
        pixels = imread(run / "plots" / name)
        assert pixels.shape[0] > 100 and pixels.std() > 0.01


def test_an_earlier_step_leaves_the_pictures_whole(run: Path) -> None:
    assert main(["gates", str(run)]) == 0
    picture = run / "plots" / "gates_by_step.png"
    before = imread(picture)
    assert main(["gates", str(run), "--step", "2"]) == 0
    assert GateStatistics.load(run / "gates.json").step == 2 and (imread(picture) == before).all()


def test_a_narrow_terminal_cuts_no_figure(run: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "fusiontree", "gates", str(run)]
    subprocess.run(command, stdout=follower, env=os.environ | {"COLUMNS": "80", "TERM": "xterm"}, check=True)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    record = GateStatistics.load(run / "gates.json")
    assert f"{record.layers[0].mean:.3f}" in shown and f"{record.layers[0].entropy:.3f}" in shown
    assert "…" not in shown.split("entropy in nats")[0].split("Gates at step")[1]


def test_a_file_is_no_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates", str(run / "config.yaml")]) == 2
    assert f"{run / 'config.yaml'} is a file; name the directory of a training run" in capsys.readouterr().err


def test_an_earlier_step_can_be_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gates", str(run), "--step", "5"]) == 0
    assert "Gates at step 4" in capsys.readouterr().out
    assert main(["gates", str(run), "--step", "0"]) == 2
    assert "no gate record up to step 0" in capsys.readouterr().err


def test_gate_records_hold_what_the_gates_did(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "gates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 6]
    layer = lines[-1]["layers"][0]
    assert layer["tokens"] == lines[-1]["tokens"] == 2 * 2 * 24
    assert layer["mean"] == pytest.approx(sum(layer["channel_mean"]) / len(layer["channel_mean"]), abs=1e-3)
    assert 0 < layer["entropy"] <= math.log(2) + 1e-6
    assert layer["mamba_norm"] > 0 and layer["attention_norm"] > 0


def test_a_record_that_is_being_written_is_left_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "gates.jsonl").read_text()
    (run / "gates.jsonl").write_text(text + text[:40])
    assert main(["gates", str(run)]) == 0
    assert "Gates at step 6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run), "does not exist"),
        (lambda run: (run / "gates.jsonl").unlink(), "holds no gates.jsonl"),
        (lambda run: (run / "gates.jsonl").write_text(""), "holds no record yet"),
        (lambda run: (run / "gates.jsonl").write_text("{\n{}\n"), "gates.jsonl:1 is not JSON"),
    ],
)
def test_nothing_to_show_is_one_sentence(run: Path, capsys: pytest.CaptureFixture[str], damage, said: str) -> None:
    damage(run)
    assert main(["gates", str(run)]) == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ") and said in errors and "\n" not in errors
