"""Runs of several real processes as their users start, stop and lose them."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launched import ENVIRONMENT, by_hand, torchrun, write
from stopped_runs import rows

import fusiontree
import warm

ROOT = Path(__file__).parents[2]


def test_zero_needs_no_launcher_for_one_process(run_settings, tmp_path: Path) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"max_steps": 2, "eval_interval": 0},
        system={"device": "cpu", "num_threads": 1, "zero_stage": 2},
    )
    config = write(sections, tmp_path / "run.yaml")
    command = [warm.python(), "-m", "fusiontree", "train", "--config", config]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "latest" / "model.safetensors").exists()
    alone = subprocess.run(
        [*command, f"output_dir={tmp_path / 'other'}"],
        env=ENVIRONMENT | {"WORLD_SIZE": "2", "RANK": "0"},
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 2
    (line,) = alone.stderr.splitlines()
    assert line.startswith("error: WORLD_SIZE is 2 but MASTER_ADDR, MASTER_PORT are not set: start it with torchrun")


def test_another_zero_stage_than_asked_for_does_not_train(run_settings, tmp_path: Path) -> None:
    """A library in between that changes what DeepSpeed is told."""
    sections = run_settings(output_dir=str(tmp_path / "run"), system={"device": "cpu", "zero_stage": 2})
    script = tmp_path / "meddles.py"
    script.write_text(
        textwrap.dedent(
            """\
            import sys
            import accelerate
            from fusiontree.cli import main

            prepare = accelerate.Accelerator.prepare

            def meddle(self, *objects):
                self.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"] = 1
                return prepare(self, *objects)

            accelerate.Accelerator.prepare = meddle
            sys.exit(main(sys.argv[1:]))
            """
        )
    )
    command = [warm.python(), str(script), "train", "--config", write(sections, tmp_path / "run.yaml")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert (
        "error: stage 2, offload_optimizer none, offload_param none was asked for but DeepSpeed would run stage 1"
        in (done.stderr)
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        ("output_dir={notes}/run", "output_dir: nothing can be written to "),
        ("system.num_devices=8", "system.num_devices is 8 but 2 processes run"),
        ("data.train_paths=missing.jsonl", "missing.jsonl"),
    ],
)
def test_what_all_processes_find_out_is_told_once(run_settings, tmp_path: Path, problem: str, said: str) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("kept")
    config = write(run_settings(output_dir=str(tmp_path / "run")), tmp_path / "run.yaml")
    process = torchrun("-m", "fusiontree", "train", "--config", config, problem.format(notes=notes))
    shown, _ = process.communicate(timeout=110)
    assert process.returncode != 0 and "gloo" not in shown and not (tmp_path / "run").exists()
    (sentence,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert said in sentence


def test_a_mistake_is_told_by_a_process_that_comes_to_it_late(run_settings, tmp_path: Path) -> None:
    """The launcher ends it as soon as another has ended."""
    config = write(run_settings(output_dir=str(tmp_path / "run")), tmp_path / "run.yaml")
    script = tmp_path / "late.py"
    script.write_text(
        "import os, sys, time\n"
        "time.sleep(4 if os.environ['RANK'] == '0' else 0)\n"
        "from fusiontree.cli import main\n"
        "sys.exit(main())\n"
    )
    process = torchrun(str(script), "train", "--config", config, "system.num_devices=8")
    shown, _ = process.communicate(timeout=110)
    assert [line for line in shown.splitlines() if line.startswith("error: ")] == [
        line for line in shown.splitlines() if "system.num_devices is 8 but 2 processes run" in line
    ]
    assert shown.count("system.num_devices is 8 but 2 processes run") == 1


@pytest.mark.parametrize("system", [{}, {"zero_stage": 2}], ids=["ddp", "zero2"])
def test_one_process_alone_prints_and_draws(run_settings, tmp_path: Path, system: dict[str, Any]) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        logging={"progress": "plain"},
        system={"device": "cpu", "num_threads": 1} | system,
    )
    script = tmp_path / "says_who_draws.py"
    script.write_text(
        textwrap.dedent(
            """\
            import os, sys
            from fusiontree import plots
            from fusiontree.cli import main

            draw = plots.plot_run
            plots.plot_run = lambda run: print("drawn by", os.environ["RANK"], flush=True) or draw(run)
            sys.exit(main(sys.argv[1:]))
            """
        )
    )
    process = torchrun(str(script), "train", "--config", write(sections, tmp_path / "run.yaml"))
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    expected = [f"{tmp_path / 'run'}: new run", "AdamW, weight decay", "AdamW, no weight decay", "step 0  eval loss"]
    for last in (3, 6):
        expected += [*(f"step {step}/6  loss" for step in range(last - 2, last + 1)), f"step {last}  eval loss"]
    expected += ["done: 6 steps", "drawn by 0"]
    lines = shown.splitlines()
    assert len(lines) == len(expected), shown
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), shown


@pytest.mark.parametrize(
    ("different", "said"),
    [
        ("training.batch_size=3", "training.batch_size is 3 in process 1 but 2 in process 0: start all processes with"),
        ("data.train_paths={other}", "the fingerprint of the training data is "),
    ],
)
def test_processes_that_differ_are_refused_in_one_sentence(
    run_settings, corpus: Path, tmp_path: Path, different: str, said: str
) -> None:
    """Each process is started by hand, as on machines whose files have gone apart."""
    config = write(run_settings(output_dir=str(tmp_path / "run")), tmp_path / "run.yaml")
    other = tmp_path / "other.jsonl"
    other.write_text((corpus / "train.jsonl").read_text().replace("fox", "cat"), encoding="utf-8")
    overrides = ["--config", config], ["--config", config, different.format(other=other)]
    codes, shown = by_hand(*(["-m", "fusiontree", "train", *arguments] for arguments in overrides))
    assert codes == [2, 2], shown
    (sentence,) = [line for text in shown for line in text.splitlines() if line.startswith("error: ")]
    assert said in sentence
    assert not (tmp_path / "run").exists()


def test_a_process_that_fails_while_the_run_is_opened_ends_the_others_quietly(run_settings, tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(
        textwrap.dedent(
            """\
            import sys
            from fusiontree.cli import main
            from fusiontree.train import run_files

            def fail(*arguments):
                raise RuntimeError("boom")

            run_files.dump_yaml = fail
            sys.exit(main(sys.argv[1:]))
            """
        )
    )
    command = [str(script), "train", "--config"]
    command.append(write(run_settings(output_dir=str(tmp_path / "run")), tmp_path / "run.yaml"))
    codes, (first, second) = by_hand(command, command)
    assert codes == [1, 2] and "RuntimeError: boom" in first
    assert second.strip() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "zero_stage", "engine"),
    [
        # On CPUs --multi_gpu is what starts several processes; --cpu would start one.
        (["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"], 0, "DDP on 2 x cpu"),
        (["deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--module"], 2, "DeepSpeed ZeRO-2 on 2 x"),
    ],
)
def test_other_launchers(run_settings, tmp_path: Path, launcher: list[str], zero_stage: int, engine: str) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        logging={"progress": "plain"},
        system={"device": "cpu", "num_threads": 1, "zero_stage": zero_stage, "num_devices": 2},
    )
    config = write(sections, tmp_path / "run.yaml")
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "fusiontree", "train", "--config", config],
        env=ENVIRONMENT | {"DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert engine in done.stderr + done.stdout
    assert [row["step"] for row in rows(tmp_path / "run", "metrics.jsonl") if "lm_loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_launchers_sigterm_after_ctrl_c_leaves_time_to_save(run_settings, tmp_path: Path) -> None:
    """As `deepspeed` sends it; the disk is slow."""
    script = tmp_path / "slow_disk.py"
    script.write_text(
        textwrap.dedent(
            """\
            import sys, time
            from fusiontree.cli import main
            from fusiontree.train import checkpoint

            write = checkpoint.list_files
            checkpoint.list_files = lambda folder: time.sleep(2) or write(folder)
            sys.exit(main(sys.argv[1:]))
            """
        )
    )
    sections = run_settings(
        output_dir=str(tmp_path / "run"), training={"max_steps": 5000, "eval_interval": 0, "save_interval": 0}
    )
    command = [warm.python(), str(script), "train", "--config", write(sections, tmp_path / "run.yaml")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(rows(tmp_path / "run", "metrics.jsonl")) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 130, shown
    saved = int((tmp_path / "run" / "latest").resolve().name.removeprefix("step_"))
    assert saved == rows(tmp_path / "run", "metrics.jsonl")[-1]["step"] >= 3


@pytest.mark.slow
def test_twenty_kills_of_random_processes_change_nothing(run_settings, tmp_path: Path) -> None:
    """ZeRO-2, 200 steps; each time one process of the two is killed, torchrun ends the other, and the run goes on."""
    changes = {
        "training": {"max_steps": 200, "eval_interval": 0, "save_interval": 5, "log_interval": 1},
        "model": {"dropout": 0.1, "drop_branch_prob": 0.2},
        "system": {"device": "cpu", "num_threads": 1, "zero_stage": 2},
    }
    straight = run_settings(**changes, output_dir=str(tmp_path / "straight"))
    stopped = run_settings(**changes, output_dir=str(tmp_path / "stopped"))

    def train(sections: dict[str, Any], config: str) -> subprocess.Popen[str]:
        # torchrun itself is a real one, whose children are then those that train.
        command = [sys.executable, *warm.torchrun()[1:], "-m", "fusiontree", "train", "--config", config]
        return subprocess.Popen(
            [*command, "--resume", "auto"],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    undisturbed = train(straight, write(straight, tmp_path / "straight.yaml"))
    shown, _ = undisturbed.communicate(timeout=900)
    assert undisturbed.returncode == 0, shown[-3000:]
    seed = time.time_ns() % 10_000
    draw = random.Random(seed)
    config, run, kills, last = write(stopped, tmp_path / "stopped.yaml"), tmp_path / "stopped", 0, 0
    while kills < 20:
        until = last + draw.randint(1, 9)
        process = train(stopped, config)
        while process.poll() is None and (max([row["step"] for row in rows(run, "metrics.jsonl")] or [0])) < until:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        workers = [child for child in psutil.Process(process.pid).children() if "fusiontree" in child.cmdline()]
        draw.choice(workers).kill()
        kills += 1
        process.communicate(timeout=120)
        last = max(row["step"] for row in rows(run, "metrics.jsonl"))
    final = train(stopped, config)
    shown, _ = final.communicate(timeout=900)
    assert final.returncode == 0, f"seed {seed}\n{shown[-3000:]}"
    assert kills == 20, f"seed {seed}: the run ended after {kills} kills"
    found, wanted = (fusiontree.load(path, device="cpu").state_dict() for path in (run, tmp_path / "straight"))
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items()), f"seed {seed}"
    assert rows(run, "metrics.jsonl") == rows(tmp_path / "straight", "metrics.jsonl"), f"seed {seed}"
