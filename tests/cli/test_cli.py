"""The command line as a user meets it: every test runs it in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import pytest
import torch

from fusiontree.cli import main

SCRIPT = Path(sys.executable).with_name("fusiontree")


def run(
    *arguments: str, command: Sequence[str] = (str(SCRIPT),), timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
    )


def run_failing_command(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line with one more command, `fail`, whose body is given."""
    code = """
        import sys, types
        sys.argv[0] = "fusiontree"
        from fusiontree import cli
        def fail():
            exec(sys.argv[1], {})
        sys.modules["failing"] = types.SimpleNamespace(fail=fail)
        cli.COMMANDS["fail"] = cli._Entry("failing:fail", "Fails.")
        sys.exit(cli.main(["fail"]))
    """
    arguments = [textwrap.dedent(code), textwrap.dedent(body)]
    return run(*arguments, command=(sys.executable, "-c"), **environment)


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "passive"}, "None")],
    ids=str,
)
def test_waiting_threads_do_not_spin_for_long(given: dict[str, str], spins: str) -> None:
    script = "import os, sys; sys.argv = ['fusiontree']; from fusiontree.cli import main; main(['--version']); "
    script += "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    kept = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=kept | given)
    # Set before torch loads the library that reads it.
    assert done.stdout.splitlines()[-1] == f"{spins} False", done.stderr


@pytest.mark.parametrize("command", [[str(SCRIPT)], [sys.executable, "-m", "fusiontree"]])
@pytest.mark.parametrize("arguments", [["--help"], []])
def test_help_lists_every_command(command: list[str], arguments: list[str]) -> None:
    shown = run(*arguments, command=command)
    assert shown.returncode == 0
    assert shown.stderr == ""
    for name in ("train", "eval", "gates", "generate", "data", "bench", "doctor", "quickstart"):
        assert re.search(rf"^  {name} +[A-Z].*\.$", shown.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", [(str(SCRIPT),), (sys.executable, "-m", "fusiontree")])
def test_help_is_quick_and_leaves_the_heavy_libraries_alone(command: tuple[str, ...]) -> None:
    fastest = min(_seconds(command) for _ in range(3))
    assert fastest < 1.0
    shown = run("--help", command=command, PYTHONPROFILEIMPORTTIME="1")
    imported = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines() if line.startswith("import time")}
    assert "fusiontree.cli" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy", "matplotlib", "fusiontree.cli.train"}


def _seconds(command: Sequence[str]) -> float:
    start = time.perf_counter()
    run("--help", command=command)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", ["train", "eval", "gates", "generate", "data", "bench", "doctor", "quickstart"])
def test_every_command_has_help(name: str) -> None:
    shown = run(name, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"Usage: fusiontree {name}" in shown.stdout
    assert "--help" in shown.stdout


def test_the_version_is_that_of_the_package() -> None:
    # Read by a process of its own: importing the package here would load torch for nothing else in this file.
    version = Path(__file__).parents[2] / "src" / "fusiontree" / "version.py"
    assert f'__version__ = "{run("--version").stdout.strip()}"' in version.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["zzz"], "there is no command 'zzz'; there are train, eval"),
        (["--bogus"], "No such option: --bogus"),
        (["doctor", "--bogus"], "see `fusiontree doctor --help`"),
        (["doctor", "more"], "more"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: list[str], says: str) -> None:
    shown = run(*arguments)
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert re.fullmatch(r"error: .+\n", shown.stderr)
    assert says in shown.stderr


def test_a_command_without_its_sub_command_shows_its_help() -> None:
    shown = run("data")
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert shown.stderr.startswith("Usage: fusiontree data [OPTIONS] COMMAND [ARGS]...\n")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (
            "from fusiontree.config import InputError\nraise InputError('x.jsonl:3 is broken; mend it')",
            "x.jsonl:3 is broken",
        ),
        ("import errno\nraise OSError(errno.ENOSPC, 'No space left on device', 'runs/a')", "runs/a: the disk is full"),
        ("open('/dev/full', 'w', buffering=1).write('x\\n')", "the disk is full"),
        ("import errno\nraise PermissionError(errno.EACCES, 'Permission denied', '/a')", "/a: permission denied"),
        ("import errno\nraise OSError(errno.EROFS, 'Read-only file system', '/a')", "/a: the file system is read-only"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(body: str, says: str) -> None:
    shown = run_failing_command(body)
    assert shown.returncode == 2
    assert re.fullmatch(r"error: .+\n", shown.stderr)
    assert says in shown.stderr


def test_an_error_in_a_data_worker_is_told_without_its_traceback() -> None:
    shown = run_failing_command(
        """
        import torch
        from fusiontree.config import InputError
        class Broken(torch.utils.data.Dataset):
            def __len__(self): return 1
            def __getitem__(self, index): raise InputError("a.jsonl:7: has no key 'text'; mend it")
        for item in torch.utils.data.DataLoader(Broken(), num_workers=1):
            pass
        """
    )
    assert (shown.returncode, shown.stderr) == (2, "error: a.jsonl:7: has no key 'text'; mend it\n")


def test_a_bug_keeps_its_traceback() -> None:
    shown = run_failing_command("{}['key']")
    assert shown.returncode == 1
    assert "Traceback (most recent call last)" in shown.stderr
    assert "KeyError: 'key'" in shown.stderr


def test_the_traceback_of_any_error_can_be_asked_for() -> None:
    body = "from fusiontree.config import InputError\nraise InputError('broken')"
    assert "Traceback" in run_failing_command(body, FUSIONTREE_TRACEBACK="1").stderr


def test_interrupting_exits_with_130() -> None:
    shown = run_failing_command("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time; time.sleep(5)")
    assert (shown.returncode, shown.stderr) == (130, "interrupted\n")


def test_a_reader_that_leaves_early_is_no_error() -> None:
    writer = subprocess.Popen(
        [SCRIPT, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == b""
    assert writer.wait(timeout=120) == 1


def test_memory_that_does_not_suffice_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # More than a process can address: torch's own error, on every machine.
    monkeypatch.setattr("fusiontree.cli.doctor.examine", lambda: torch.empty(2**60, dtype=torch.uint8))
    assert main(["doctor"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: there is not enough memory (") and shown.count("\n") == 1


def test_doctor_reports_this_machine() -> None:
    shown = run("doctor", "--json")
    assert shown.returncode == 0, shown.stderr
    report = json.loads(shown.stdout)
    assert report["libraries"]["core"]["torch"] == metadata.version("torch")
    assert set(report["libraries"]) >= {
        "core",
        "deepspeed",
        "gpu",
        "serve",
        "track",
        "eval",
        "quant",
        "dev",
        "integration",
    }
    assert report["problems"] == []
    assert report["backends"]["ssd_scan"]["reference"]["usable"] is True
    assert report["backends"]["ssd_scan"]["torch"]["usable"] is True
    assert report["cpu"]["cores_usable"] >= 1


def test_doctor_names_a_library_of_the_wrong_version(tmp_path: Path) -> None:
    information = tmp_path / "transformers-4.0.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.0.0\n")
    shown = run("doctor", PYTHONPATH=str(tmp_path))
    assert shown.returncode == 1
    assert re.search(r"problem: transformers<6,>=5\.\d+ is required, 4\.0\.0 installed: pip install", shown.stdout)
    assert re.search(rf"^  torch +{re.escape(metadata.version('torch'))}$", shown.stdout, re.MULTILINE)
    assert re.search(r"^  ssd_scan\n(?:    .*\n)*?    \+ torch ", shown.stdout, re.MULTILINE)
