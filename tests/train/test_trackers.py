"""W&B, TensorBoard and CSV show the rows of metrics.jsonl, those and no others, whatever happens to a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from stopped_runs import rows, stop
from tracked_rows import (
    Rows,
    by_tag,
    in_csv,
    in_metrics,
    in_tensorboard,
    in_wandb,
    pictures_in_tensorboard,
    pictures_in_wandb,
)
from wandb_server import wandb_server

import fusiontree
import warm
from fusiontree.cli import main
from fusiontree.errors import InputError
from fusiontree.train import trackers
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import LoggingSettings, RunSettings

ALL = {"trackers": ["wandb", "tensorboard", "csv"], "wandb_mode": "offline"}


def shown(rows: Rows) -> Rows:
    """Without what is null, for which no tracker has a place."""
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def assert_shown(run: Path) -> None:
    """Every tracker shows every row once, in order."""
    expected = in_metrics(run)
    assert len(expected) > 5
    assert in_csv(run) == shown(expected)
    assert in_wandb(run, len(expected)) == shown(expected)
    found, wanted = in_tensorboard(run), by_tag(expected)
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points], tag
        values = [value for _, value in points]
        assert [value for _, value in found[tag]] == pytest.approx(values, rel=1e-6), tag  # stored as float32


def test_after_a_resume_they_show_the_rows_of_a_run_that_never_stopped(run_settings, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training": {"max_steps": 8, "save_interval": 3}, "gate_monitor": {"interval": 2}}
    straight = run_settings(**changes, output_dir=str(tmp_path / "straight"))
    fusiontree.train(straight)
    tracked = run_settings(**changes, logging=ALL, output_dir=str(tmp_path / "run"))
    run = tmp_path / "run"
    fusiontree.train(tracked)
    assert_shown(run)
    identifier = (run / "wandb_id").read_text()
    # Rows 4 to 8 are dropped and written again; what stands in the trackers must not appear twice.
    fusiontree.train(tracked, resume=str(run / "checkpoints" / "step_00000003"))
    assert_shown(run)
    assert rows(run, "metrics.jsonl") == rows(tmp_path / "straight", "metrics.jsonl")
    assert (run / "wandb_id").read_text() == identifier
    # From the beginning, as a scheduler does with a run that was lost before its first checkpoint.
    shutil.rmtree(run / "checkpoints")
    (run / "latest").unlink()
    fusiontree.train(tracked, resume="auto")
    assert_shown(run)


def test_they_get_the_pictures_of_a_run_when_it_ends(run_settings, tmp_path: Path) -> None:
    """Its gate maps among them; once more when it goes on, in place of the earlier ones."""
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(run_settings(logging=ALL, output_dir=str(run))))
    for last in (6, 8):
        arguments = ["--config", str(config), "--resume", "auto", f"training.max_steps={last}"]
        assert main(["train", *arguments]) == 0
        drawn = {path.stem: path.read_bytes() for path in (run / "plots").iterdir()}
        assert drawn.keys() == {"learning_curve", "gates_by_step", "gates_by_channel"}
        assert pictures_in_tensorboard(run) == {name: [(last, picture)] for name, picture in drawn.items()}
        assert pictures_in_wandb(run, 3) == {name: (f"step {last}", picture) for name, picture in drawn.items()}
        assert_shown(run)


def test_a_run_that_goes_back_while_it_trains(tmp_path: Path) -> None:
    """Rows that are dropped from the file of an open run are dropped from its trackers."""
    log = trackers.MetricsLog(tmp_path)
    log.open_trackers(LoggingSettings.parse(ALL), {})
    for step in range(1, 8):
        log.write({"step": step, "loss": 1 / step})
    assert [row["step"] for row in log.truncate_after(4)] == [1, 2, 3, 4]
    for step in range(5, 9):
        log.write({"step": step, "loss": 2 / step})
    log.close()
    assert [row["step"] for row in in_metrics(tmp_path)] == list(range(1, 9))
    assert_shown(tmp_path)


def test_a_tracker_that_comes_late_shows_the_whole_run(run_settings, tmp_path: Path) -> None:
    """Switched on for a run that is complete, which trains no step more."""
    run = tmp_path / "run"
    fusiontree.train(run_settings(output_dir=str(run)))
    before = (run / "metrics.jsonl").read_bytes()
    assert not {"metrics.csv", "tensorboard", "wandb", "wandb_id"} & {path.name for path in run.iterdir()}
    fusiontree.train(run_settings(logging=ALL, output_dir=str(run)), resume="auto")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert_shown(run)


def test_columns_that_come_later_and_numbers_that_are_not_there(run_settings, tmp_path: Path) -> None:
    """A curriculum's `length` and an `mfu` after a resume; a gate deviation before the first record."""
    run = tmp_path / "run"
    sections = run_settings(gate_monitor={"enabled": False}, logging={"trackers": "csv"}, output_dir=str(run))
    fusiontree.train(sections)
    sections["training"]["max_steps"], sections["system"]["peak_tflops"] = 9, 1.0
    fusiontree.train(sections, resume="auto")
    found = in_csv(run)
    assert found == shown(in_metrics(run))
    assert [row["step"] for row in found if "mfu" in row] == [7, 8, 9]
    assert "gate_std" not in found[-1] and in_metrics(run)[1]["gate_std"] is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_tracker_that_fails_is_left_behind(run_settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One when it opens, one in mid-run; the rest goes on, and a resume hands over what is missing."""
    sections = run_settings(logging={"trackers": ["csv", "tensorboard"]}, output_dir=str(tmp_path / "run"))
    run = tmp_path / "run"
    (run / "metrics.csv").mkdir(parents=True)
    engine = TrainingEngine(RunSettings.parse(sections))
    record = engine.meter.close_row

    def fill_the_disk(step: int) -> dict[str, Any]:
        if step == 3:
            open_file = next(
                fd for fd in Path("/proc/self/fd").iterdir() if str(run / "tensorboard") in os.readlink(fd)
            )
            os.dup2(os.open("/dev/full", os.O_WRONLY), int(open_file.name))
        return record(step)

    engine.meter.close_row = fill_the_disk
    assert engine.run().step == 6
    warnings = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: csv does not show this run any more (Is a directory); ")
    assert warnings[1].startswith("warning: tensorboard does not show this run any more (No space left on device); ")
    assert str(run / "metrics.jsonl") in warnings[1]
    assert [row["step"] for row in in_metrics(run) if "lm_loss" in row] == [1, 2, 3, 4, 5, 6]
    (run / "metrics.csv").rmdir()
    fusiontree.train(sections, resume="auto")
    assert in_csv(run) == in_metrics(run)
    assert [step for step, _ in in_tensorboard(run)["lm_loss"]] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_told_before_any_work(
    run_settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    sections = run_settings(logging={"trackers": ["csv", package]}, output_dir=str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"^logging.trackers: {package} is not installed: pip install 'fusiontree\["):
        fusiontree.train(sections)
    assert not (tmp_path / "run").exists()
    # A folder of that name can be imported, and is no package.
    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    (tmp_path / package).mkdir()
    with pytest.raises(InputError, match=f"^logging.trackers: {package} is not installed"):
        fusiontree.train(sections)


def test_without_a_login_wandb_says_so(run_settings, tmp_path: Path) -> None:
    sections = run_settings(logging={"trackers": ["wandb"]}, output_dir=str(tmp_path / "run"))
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(sections))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    done = subprocess.run(
        [warm.python(), "-m", "fusiontree", "train", "--config", str(config)],
        env=environment | {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: logging.trackers: wandb: ") and "logging.wandb_mode to offline" in line


@pytest.mark.slow
def test_killed_and_interrupted_runs(run_settings, tmp_path: Path) -> None:
    training = {"max_steps": 40, "save_interval": 5, "eval_interval": 7}
    sections = run_settings(training=training, logging=ALL, output_dir=str(tmp_path / "run"))
    run = tmp_path / "run"
    code, errors = stop(sections, run, signal.SIGKILL, 12)
    assert code == -signal.SIGKILL, errors
    code, errors = stop(sections, run, signal.SIGTERM, 22)
    assert code == 143, errors
    assert_shown(run)
    # Ctrl-C reaches W&B's own processes too, as on a terminal.
    process = subprocess.Popen(
        [sys.executable, "-m", "fusiontree", "train", "--config", str(run / "config.yaml"), "--resume", "auto"],
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while (run / "metrics.jsonl").read_text().count('"lm_loss"') < 30 and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert_shown(run)
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] < 40


@pytest.mark.slow
def test_wandb_online(
    run_settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Against a stand-in for its server: resumed, each row arrives once; without a network, training goes on."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    monkeypatch.setattr(trackers, "WANDB_PATIENCE", 3.0)
    run = tmp_path / "run"
    sections = run_settings(
        training={"max_steps": 8, "save_interval": 3},
        logging={"trackers": ["wandb"], "wandb_mode": "online"},
        output_dir=str(run),
    )
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        fusiontree.train(sections)
        first = in_metrics(run)
        assert server.rows() == shown(first)
        fusiontree.train(sections, resume=str(run / "checkpoints" / "step_00000003"))
        assert "less than the current step" not in capfd.readouterr().err  # nothing is sent twice
        assert server.rows() == shown(first) and server.exit_codes == [0, 0]
        # What the server has lost is sent again.
        (history,) = server.histories.values()
        del history[4:]
        sections["training"]["max_steps"] = 9
        fusiontree.train(sections, resume="auto")
        assert server.rows() == shown(first[:4]) + shown(in_metrics(run))[4:]
        sections["training"]["max_steps"] = 10
        engine = TrainingEngine(RunSettings.parse(sections), resume="auto")
        capfd.readouterr()
    assert engine.run().step == 10  # the server is gone
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: wandb does not show this run any more (")
    sections["training"]["max_steps"] = 11
    assert fusiontree.train(sections, resume="auto").step == 11  # and does not come back
    (warning,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: wandb does not show this run any more (")
