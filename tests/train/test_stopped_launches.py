"""Several processes are asked to stop, each by what its launcher sends: all save, then all leave with the same code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from launched import ENVIRONMENT, free_port, torchrun, write
from stopped_runs import rows

import warm

ROOT = Path(__file__).parents[2]


def slow_to_draw(folder: Path) -> Path:
    """A script that is `fusiontree`, whose first process takes its time once the others are done."""
    script = folder / "slow_to_draw.py"
    script.write_text(
        "import sys, time\n"
        "from fusiontree import plots\n"
        "from fusiontree.cli import main\n"
        "draw = plots.plot_run\n"
        "plots.plot_run = lambda run: time.sleep(2) or draw(run)\n"
        "sys.exit(main())\n"
    )
    return script


def wait_for_rows(run: Path, process: subprocess.Popen[str], count: int = 3) -> None:
    deadline = time.monotonic() + 150
    while len(rows(run, "metrics.jsonl")) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def require_saved(run: Path) -> None:
    """The last step is in the newest checkpoint, and what is done after it was done."""
    saved = int((run / "latest").resolve().name.removeprefix("step_"))
    assert saved == rows(run, "metrics.jsonl")[-1]["step"] >= 3
    assert (run / "plots" / "gates_by_channel.png").is_file()


def test_a_slurm_job_saves_before_its_time_is_up_and_queues_itself_again(run_settings, tmp_path: Path) -> None:
    """Stand-ins for SLURM's commands: srun starts a process per task, passes the signal on, ends all as soon as one has
    ended with another code than 0, and returns the highest code or 128 + signal, as the real one does."""
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"max_steps": 2000, "eval_interval": 0, "save_interval": 0},
        system={"device": "cpu", "num_threads": 1, "zero_stage": 2},
    )
    config = write(sections, tmp_path / "run.yaml")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        '#!/bin/sh\ncase "$1" in show) echo localhost;; requeue) echo "requeued $2";; esac\n'
    )
    (tools / "srun").write_text(
        textwrap.dedent(
            f"""\
            #!{sys.executable}
            import os, signal, subprocess, sys, time
            command = [word for word in sys.argv[1:] if not word.startswith("--kill-on-bad-exit")]
            tasks = [
                subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
                for i in range(2)
            ]
            signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
            while None in [task.poll() for task in tasks]:
                time.sleep(0.01)
                if any(task.returncode for task in tasks) and "--kill-on-bad-exit=1" in sys.argv:
                    [task.terminate() for task in tasks]
                    time.sleep(0.5)
                    [task.kill() for task in tasks]
            sys.exit(max(code if code >= 0 else 128 - code for code in (task.returncode for task in tasks)))
            """
        )
    )
    (tools / "python").write_text(f'#!/bin/sh\nshift 2\nexec "{warm.python()}" "{slow_to_draw(tmp_path)}" "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "train.slurm"), config],
        env=ENVIRONMENT
        | {
            "PATH": f"{tools}:{Path(warm.python()).parent}:{os.environ['PATH']}",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_ID": "77",
            "MASTER_PORT": free_port(),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_rows(tmp_path / "run", job)
    (srun,) = [child for child in psutil.Process(job.pid).children() if "srun" in " ".join(child.cmdline())]
    srun.send_signal(signal.SIGUSR1)
    try:
        shown, _ = job.communicate(timeout=120)
    finally:
        for process in [*psutil.Process(job.pid).children(recursive=True), job] if job.poll() is None else []:
            process.kill()
    assert job.returncode == 138, shown
    assert "requeued 77" in shown
    require_saved(tmp_path / "run")


def test_ranks_of_torchrun_that_are_sent_sigusr1(run_settings, tmp_path: Path) -> None:
    """Not to torchrun itself, which knows nothing of it; it ends all as soon as one has ended."""
    training = {"max_steps": 2000, "eval_interval": 0, "save_interval": 0}
    sections = run_settings(output_dir=str(tmp_path / "run"), training=training)
    config = write(sections, tmp_path / "run.yaml")
    process = torchrun(str(slow_to_draw(tmp_path)), "train", "--config", config)
    wait_for_rows(tmp_path / "run", process)
    ranks = [child for child in psutil.process_iter(["cmdline"]) if config in (child.info["cmdline"] or ())]
    for rank in (rank for rank in ranks if rank.pid != process.pid):
        rank.send_signal(signal.SIGUSR1)
    shown, _ = process.communicate(timeout=120)
    assert shown.count("exitcode  : 138") == 2, shown
    require_saved(tmp_path / "run")


@pytest.mark.slow
def test_two_machines_meet_and_stop_together_when_one_is_shut_down(run_settings, tmp_path: Path) -> None:
    """Two launchers on this machine, each with one process; SIGTERM reaches one of them, and later the run goes on."""
    training = {"max_steps": 2000, "eval_interval": 0, "save_interval": 0, "warmup_steps": 10000}
    logging = {"progress": "plain"}
    sections = run_settings(output_dir=str(tmp_path / "run"), training=training, logging=logging)
    config = write(sections, tmp_path / "run.yaml")
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "torchrun").write_text(f'#!/bin/sh\nexec "{warm.python()}" -m torch.distributed.run "$@"\n')
    (tools / "unbuffered").write_text(f'#!/bin/sh\nshift\nexec "{warm.python()}" "$@"\n')  # after `-u`
    for tool in tools.iterdir():
        tool.chmod(0o755)

    def start(*overrides: str) -> list[subprocess.Popen[str]]:
        environment = ENVIRONMENT | {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON_EXEC": str(tools / "unbuffered"),
            "MACHINES": "2",
            "PROCESSES": "1",
            "RENDEZVOUS": f"localhost:{free_port()}",
        }
        command = ["bash", str(ROOT / "scripts" / "train_several_machines.sh"), config, *overrides]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return [subprocess.Popen(command, env=environment, **output) for _ in range(2)]

    machines = start()
    wait_for_rows(tmp_path / "run", machines[0])
    machines[1].terminate()
    shown = [machine.communicate(timeout=120)[0] for machine in machines]
    assert (tmp_path / "run" / "latest").exists(), shown
    require_saved(tmp_path / "run")
    saved = rows(tmp_path / "run", "metrics.jsonl")[-1]["step"]
    assert "SIGTERM: stopped after step" in "".join(shown), shown
    last = saved + 3
    machines = start(f"training.max_steps={last}")
    shown = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], shown
    assert [row["step"] for row in rows(tmp_path / "run", "metrics.jsonl")] == list(range(1, last + 1))
