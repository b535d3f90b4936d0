"""What a benchmark writes down beside its numbers, and how: hardware, versions, revision; appended under a lock."""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
ALLOCATOR_KEYS = ("GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (created if missing) among the processes of this machine."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def append_record(path: Path, record: dict) -> None:
    """Append `record` as one JSON line; safe while other processes append to the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write(json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def recorded_runs(path: Path) -> list[dict]:
    """The records of `path`, for a report.

    Raises:
        SystemExit: there are none.
    """
    if runs := read_records(path):
        return runs
    raise SystemExit(f"error: {path} holds no runs yet: run this script without --report first")


def save_by_settings(path: Path, record: dict, report: Callable[[list[dict]], str]) -> None:
    """Put `record` into a JSON list, in the place of one with equal settings, and rewrite the report beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path):
        kept = json.loads(path.read_text(encoding="utf-8") or "[]")
        kept = [other for other in kept if other["settings"] != record["settings"]] + [record]
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(report(kept), encoding="utf-8")


def save_for_cpu(directory: Path, name: str, record: dict, report: Callable[[list[dict]], str]) -> Path:
    """`save_by_settings` into the file of such records that is its processor's; returns the file."""
    path = directory / f"{name}_{cpu_slug(record['cpu'])}.json"
    save_by_settings(path, record, report)
    return path


def origin(runs: list[dict]) -> str:
    """The line under a table: where, with which code, when and how its runs were made."""
    where = {f"{r['cpu']}, {r['threads']} thread(s), torch {r['versions']['torch']}" for r in runs}
    code = {f"code revision {r['revision']} (commit {r['commit']})" for r in runs}
    days = sorted(r["date"] for r in runs)
    return f"{'; '.join(sorted(where | code))}; {days[0]} to {days[-1]}; `{runs[-1]['command']}`.\n"


def keep_records(path: Path, wanted: Callable[[dict], bool]) -> None:
    """Drop the records that are not `wanted`; a no-op where there is no file."""
    if not path.exists():
        return
    with path.open("r+", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        kept = [line for line in handle if wanted(json.loads(line))]
        handle.seek(0)
        handle.truncate()
        handle.writelines(kept)


def check_revisions(path: Path, revision: str, ours: Callable[[dict], bool]) -> None:
    """Refuse to put runs of different code of `ours` beside each other.

    Raises:
        SystemExit: `path` holds runs of ours of another revision.
    """
    others = {record["revision"] for record in read_records(path) if ours(record)} - {revision}
    if others:
        raise SystemExit(
            f"error: {path.name} holds FusionTree runs of revision {', '.join(sorted(others))}, the code is now "
            f"{revision}: remove those lines with --discard-old-revisions, or write elsewhere with --results"
        )


def cpu_model() -> str:
    """Name of the processor and what decides its speed in bf16, without anything that names the machine."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines if value}
    flags = fields.get("flags", "").split()
    bf16 = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({', '.join(bf16) or 'no avx512'})"


def cpu_slug(cpu: str) -> str:
    """`cpu_model()` as a part of a file's name; what stands in parentheses stays: equal names hide processors with and
    without bfloat16."""
    name = re.sub(r"\(r\)|\(tm\)|@|processor|cpu", " ", cpu.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def shown_arguments(argv: list[str]) -> list[str]:
    """The arguments, without the directories that a machine keeps results and models in; of a file there, its name."""
    for option in ("--results", "--cache", "--work"):
        if option in argv:
            at = argv.index(option)
            argv = argv[:at] + argv[at + 2 :]
    return [Path(word).name if word.startswith("/") else word for word in argv]


def provenance() -> dict:
    """What every record names beside its figures."""
    return {
        "cpu": cpu_model(),
        "versions": versions(),
        "allocator": allocator(),
        "commit": git_commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()}


def allocator() -> dict[str, str]:
    """The environment variables in force that change how memory is allocated, and so the speed."""
    return {
        key: value for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_") or key in ALLOCATOR_KEYS
    }


def shown_allocator(variables: dict[str, str]) -> str:
    return "`" + " ".join(f"{key}={value}" for key, value in variables.items()) + "`" if variables else "as it comes"


def git_commit() -> str:
    """Short commit of the checkout, with `+` if tracked files differ from it; `unknown` outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_revision(*parts: str) -> str:
    """12 hexadecimal digits over the Python code below `src/fusiontree/<part>` for each of `parts`.

    Comments, docstrings, layout, assertions and the annotations of functions do not enter, so only edits that could
    change a number change the revision.
    """
    digest = hashlib.sha256()
    for part in parts:
        root = REPOSITORY / "src" / "fusiontree" / part
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            tree = _Essence().visit(ast.parse(path.read_text(encoding="utf-8")))
            digest.update(path.relative_to(REPOSITORY).as_posix().encode())
            digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


class _Essence(ast.NodeTransformer):
    """Leaves what runs."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node

    def visit_Assert(self, node: ast.Assert) -> None:
        return None

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)
