"""Records survive a round trip, refuse what is not theirs, and never leave half a file."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import warm
from fusiontree.artifacts import (
    Artifact,
    BenchReport,
    DistanceAnswers,
    EvalReport,
    GateStatistics,
    LayerDecision,
    LayerGateStatistics,
    ModelFigures,
    PositionLoss,
    PrunePlan,
    RunManifest,
    TaskAnswers,
    TaskReport,
    atomic_directory,
    atomic_write,
)
from fusiontree.artifacts import plan as plan_module
from fusiontree.config import InputError

GATES = GateStatistics(
    step=20,
    tokens=4096,
    quantile_levels=[0.1, 0.5, 0.9],
    layers=[
        LayerGateStatistics(
            branches="both",
            tokens=4096,
            mean=0.52,
            std=0.1,
            quantiles=[0.4, 0.5, 0.6],
            histogram=[0.25, 0.75],
            entropy=0.69,
            saturation=0.0,
            mamba_norm=3.5,
            attention_norm=2.5,
            channel_mean=[0.5, 0.54],
        ),
        LayerGateStatistics(branches="mamba", tokens=0),
    ],
)
PLAN = PrunePlan(
    criterion="gate thresholds",
    thresholds={"mamba_above": 0.8},
    source="runs/a/gates.jsonl",
    layers=[
        LayerDecision(keep="mamba", reason="mean 0.9 above 0.8", evidence={"mean": 0.9}, constant=[0.0, 1.0]),
        LayerDecision(keep="both", reason="in between", heads={"mamba": [0, 2]}, head_constants=[0.5, 0.1 + 0.2]),
    ],
)
REPORT = EvalReport(
    model="runs/模型",
    data=["eval.jsonl"],
    tokens=100,
    loss=4.25,
    perplexity=math.exp(4.25),
    by_position=[PositionLoss(start=0, end=64, tokens=100, loss=4.25)],
    tasks=TaskReport(
        written=["needle"],
        seed=0,
        documents=2,
        tokens=200,
        too_short=1,
        results=[
            TaskAnswers(
                task="needle",
                answers=2,
                right=0.5,
                tokens=10,
                loss=1.5,
                by_distance=[DistanceAnswers(start=0, end=64, answers=2, right=0.5, tokens=10, loss=1.5)],
            )
        ],
    ),
)


def constants_of(plan: Path) -> Path:
    (found,) = plan.parent.glob(f"{plan.stem}.constants.*safetensors")
    return found


@pytest.mark.parametrize("record", [PLAN, REPORT, RunManifest.collect({"seed": 0}, parent_run="runs/a")])
def test_a_record_loads_as_it_was_saved(tmp_path: Path, record: Artifact) -> None:
    path = tmp_path / "new" / "record.json"
    record.save(path)
    assert type(record).load(path) == record
    beside = [constants_of(path).name] if record is PLAN else []
    assert sorted(p.name for p in path.parent.iterdir()) == [*beside, "record.json"]


def test_plans_side_by_side_leave_each_others_constants_alone(tmp_path: Path) -> None:
    plans = {}
    for number, name in enumerate(["plan_1.4x", "plan_1.8x", "plan_1.4x.json", "plan_1"]):
        first = PLAN.layers[0].model_copy(update={"constant": [0.0, 2.0 + number]})
        plans[name] = PLAN.model_copy(update={"layers": [first, *PLAN.layers[1:]]})
        plans[name].save(tmp_path / name)
    for name, plan in plans.items():
        assert PrunePlan.load(tmp_path / name) == plan
    # Replaced, a plan takes its old constants along, and no others.
    PLAN.save(tmp_path / "plan_1.8x")
    assert len(list(tmp_path.iterdir())) == 2 * len(plans)
    assert all(PrunePlan.load(tmp_path / name) == (PLAN if name == "plan_1.8x" else plans[name]) for name in plans)
    # Nor does a copy of another plan that is replaced take the other's.
    shutil.copy(tmp_path / "plan_1.4x", tmp_path / "copy.json")
    PLAN.save(tmp_path / "copy.json")
    assert PrunePlan.load(tmp_path / "plan_1.4x") == plans["plan_1.4x"]


def test_a_report_of_before_there_were_tasks_still_loads(tmp_path: Path) -> None:
    record = json.loads(REPORT.dumps())
    (tmp_path / "report.json").write_text(
        json.dumps({k: v for k, v in record.items() if k != "tasks"} | {"version": 1})
    )
    assert EvalReport.load(tmp_path / "report.json") == REPORT.model_copy(update={"tasks": None})


def test_numbers_that_are_not_finite_survive_in_strict_json(tmp_path: Path) -> None:
    line = GATES.dumps()
    assert "\n" not in line
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    loaded = GateStatistics.loads(line, source="gates.jsonl:1")
    assert loaded.layers[0] == GATES.layers[0]
    assert math.isnan(loaded.layers[1].mean)
    assert loaded.layers[1].branches == "mamba"


def test_a_manifest_says_what_ran() -> None:
    manifest = RunManifest.collect({"seed": 3}, data_fingerprint="abc")
    assert manifest.versions["torch"]
    assert manifest.versions["python"] == sys.version.split()[0]
    assert Path(sys.argv[0]).name in manifest.command
    assert manifest.started.endswith("+00:00")


def test_a_plan_reads_as_layer_branches() -> None:
    assert PLAN.layer_branches == ["mamba", "both"]


def test_speeds_of_one_length_and_batch_still_load(tmp_path: Path) -> None:
    figures = {"name": "m", "parameters": 1, "parameter_bytes": 4, "state_bytes": 2, "first_token_seconds": 0.5}
    figures |= {"prefill_tokens_per_second": 3.0, "decode_tokens_per_second": 4.0}
    old = {"kind": "bench_report", "version": 1, "settings": {}, "machine": {}, "models": [figures], "versions": {}}
    (tmp_path / "bench.json").write_text(json.dumps(old))
    assert BenchReport.load(tmp_path / "bench.json").models == [ModelFigures(**figures, more=[])]


def test_a_plan_of_the_first_version_still_loads(tmp_path: Path) -> None:
    layers = [{"keep": "mamba", "reason": "r", "evidence": {}, "constant": [0.0, 1.0]}]
    old = {"kind": "prune_plan", "version": 1, "criterion": "c", "thresholds": {}, "source": "s", "layers": layers}
    (tmp_path / "plan.json").write_text(json.dumps(old))
    plan = PrunePlan.load(tmp_path / "plan.json")
    assert plan.layer_branches == ["mamba"] and plan.layers[0].constant == [0.0, 1.0] and plan.model is None


def test_the_constants_of_a_plan_lie_beside_it_and_belong_to_it(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    beside = constants_of(path)
    assert '"constant": null' in path.read_text() and str(tmp_path) not in path.read_text()
    (tmp_path / "elsewhere").mkdir()
    for file in (path, beside):
        file.rename(tmp_path / "elsewhere" / file.name)
    assert PrunePlan.load(tmp_path / "elsewhere" / "plan.json") == PLAN
    PLAN.save(path)
    OTHER_PLAN.save(tmp_path / "other.json")
    constants_of(tmp_path / "other.json").replace(beside)
    with pytest.raises(InputError, match=r"plan.constants\.\w+.safetensors does not belong to .*plan.json"):
        PrunePlan.load(path)
    beside.unlink()
    with pytest.raises(InputError, match=r"plan.constants\.\w+.safetensors cannot be read .*move both together"):
        PrunePlan.load(path)


OTHER_PLAN = PLAN.model_copy(update={"layers": [PLAN.layers[0].model_copy(update={"gate": [0.5, 0.25]})]})


def test_a_plan_is_replaced_with_its_constants_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, neighbour = tmp_path / "plan.json", tmp_path / "plan2.json"
    for file in (path, neighbour):
        PLAN.save(file)

    class Killed(BaseException):
        pass

    written: list[Path] = []

    def write_one(place: str | Path, content: bytes | str) -> None:
        if written:
            raise Killed
        written.append(Path(place))
        atomic_write(place, content)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(plan_module, "atomic_write", write_one)
        OTHER_PLAN.save(path)
    assert written[0].exists() and PrunePlan.load(path) == PLAN
    OTHER_PLAN.save(path)
    assert PrunePlan.load(path) == OTHER_PLAN and constants_of(path) == written[0]
    bare = PLAN.model_copy(update={"layers": [LayerDecision(keep="both", reason="in between")]})
    bare.save(path)
    assert PrunePlan.load(path) == bare and not list(tmp_path.glob("plan.constants*"))
    assert PrunePlan.load(neighbour) == PLAN


def test_a_plan_whose_constants_have_the_old_name_still_loads(tmp_path: Path) -> None:
    path, old = tmp_path / "plan.json", tmp_path / "plan.constants.safetensors"
    PLAN.save(path)
    path.write_text(path.read_text().replace(constants_of(path).name, old.name))
    constants_of(path).rename(old)
    assert PrunePlan.load(path) == PLAN
    PLAN.save(path)
    assert PrunePlan.load(path) == PLAN and not old.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text[: len(text) // 2], "truncated or not JSON"),
        (lambda text: "", "truncated or not JSON"),
        (
            lambda text: text.replace(f'"version": {PrunePlan.VERSION}', f'"version": {PrunePlan.VERSION + 1}'),
            f"newer FusionTree (format {PrunePlan.VERSION + 1}, this one reads up to {PrunePlan.VERSION})",
        ),
        (lambda text: text.replace(f'"version": {PrunePlan.VERSION}', '"version": "x"'), "does not say the version"),
        (lambda text: text.replace("prune_plan", "eval_report"), "holds 'eval_report' where 'prune_plan' is needed"),
        (lambda text: "[1, 2]", "holds something else where 'prune_plan' is needed"),
        (lambda text: text.replace('"keep": "both"', '"keep": "neither"'), "layers.1.keep"),
        (lambda text: text.replace('"criterion"', '"kriterion"'), "criterion: field required"),
    ],
)
def test_a_damaged_record_is_told_in_one_sentence(tmp_path: Path, change: object, says: str) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        PrunePlan.load(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="plan.json does not exist"):
        PrunePlan.load(tmp_path / "plan.json")


def test_atomic_write_keeps_links_and_the_users_file_mode(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    old_mask = os.umask(0o022)
    try:
        atomic_write(tmp_path / "link", "größer\n")
    finally:
        os.umask(old_mask)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == "größer\n".encode()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o644


def read_through_pipe(pipe: Path) -> tuple[threading.Thread, list[bytes]]:
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    reader.start()
    return reader, found


def test_what_is_no_regular_file_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "pipe", tmp_path / "link"):
        reader, found = read_through_pipe(tmp_path / "pipe")
        atomic_write(path, "größer\n")
        reader.join(timeout=30)
        assert found == ["größer\n".encode()]
    assert (tmp_path / "pipe").is_fifo() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "pipe"]


def test_a_file_that_cannot_be_made_is_named_itself() -> None:
    with pytest.raises(OSError) as caught:
        atomic_write("/proc/page.html", "")
    assert caught.value.filename == "/proc/page.html"


def test_atomic_directory_appears_and_replaces_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"
    for content in ("first", "second"):
        with atomic_directory(target) as directory:
            (directory / "sub").mkdir()
            (directory / "sub" / content).write_text(content)
            assert not (target / "sub" / content).exists()
        assert [p.name for p in (target / "sub").iterdir()] == [content]
        assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_leaves_the_old_directory(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "checkpoint"
    with atomic_directory(target) as directory:
        (directory / "a").write_text("old")
    with pytest.raises(type(error)), atomic_directory(target) as directory:
        (directory / "a").write_text("new")
        raise error
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_atomic_directory_refuses_to_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(NotADirectoryError), atomic_directory(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


# What runs where no file may grow past the limit: each line of output is one thing that failed as it should.
FULL_DISK = textwrap.dedent(
    """
    import errno, signal, sys, resource
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from fusiontree.artifacts import atomic_directory, atomic_write

    root, limited = Path(sys.argv[1]), sys.argv[2] == "limited"
    if limited:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    numbers = torch.arange(1 << 22, dtype=torch.float32)

    def write_bytes(path):
        atomic_write(path / "file", b"new" * (1 << 20))

    def write_safetensors(path):
        with atomic_directory(path / "directory") as directory:
            (directory / "small").write_text("new")
            save_file({"numbers": numbers}, directory / "large")

    def write_torch(path):
        with atomic_directory(path / "directory") as directory:
            torch.save(numbers, directory / "large")

    for write in (write_bytes, write_safetensors, write_torch):
        try:
            write(root)
        except Exception as error:
            print(write.__name__, type(error).__name__, getattr(error, "errno", None), getattr(error, "filename", None))
    """
)


def run_full_disk(root: Path, kind: str) -> dict[str, list[str]]:
    (root / "file").write_text("old")
    with atomic_directory(root / "directory") as directory:
        (directory / "small").write_text("old")
    done = subprocess.run(
        [warm.python(), "-c", FULL_DISK, str(root), kind], capture_output=True, text=True, check=True, timeout=120
    )
    assert (root / "file").read_text() == "old"
    assert [p.name for p in (root / "directory").iterdir()] == ["small"]
    assert (root / "directory" / "small").read_text() == "old"
    assert sorted(p.name for p in root.iterdir()) == ["directory", "file"]
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are a POSIX feature")
def test_a_write_that_fails_half_way_leaves_the_old_files(tmp_path: Path) -> None:
    failures = run_full_disk(tmp_path, "limited")
    assert sorted(failures) == ["write_bytes", "write_safetensors", "write_torch"]
    assert failures["write_bytes"] == ["OSError", str(errno.EFBIG), str(tmp_path / "file")]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_old_files_and_is_always_told_as_such(tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"this machine does not allow mounts: {mounted.stderr.strip()}")
    try:
        failures = run_full_disk(tmp_path, "full")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    full = str(errno.ENOSPC)
    assert failures == {
        "write_bytes": ["OSError", full, str(tmp_path / "file")],
        "write_safetensors": ["OSError", full, str(tmp_path / "directory")],
        "write_torch": ["OSError", full, str(tmp_path / "directory")],
    }
