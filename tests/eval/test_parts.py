"""What a part of an evaluation depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree.artifacts import EvalReport, library_versions
from fusiontree.eval.parts import Part, run_parts
from fusiontree.eval.task_files import task_files


def test_another_version_of_a_library_is_another_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    measured: list[float] = []

    def measure() -> dict[str, float]:
        measured.append(float(len(measured)))
        return {"loss": measured[-1]}

    def run() -> EvalReport:
        return run_parts(EvalReport(model="m"), [Part("perplexity", {"loss": None}, {}, measure)], path)

    assert [run().loss, run().loss] == [0.0, 0.0]
    for library in ("torch", "transformers"):
        changed = library_versions() | {library: "0.1"}
        monkeypatch.setattr("fusiontree.eval.parts.library_versions", lambda changed=changed: changed)
        assert run().loss == measured[-1]
    assert measured == [0.0, 1.0, 2.0]


def test_files_of_tasks_are_found_without_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tasks"
    for name in ("tasks/sub", "shared", "data/a", "data/b", "saved"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("tasks/sub/utils.py", "data/a/1.jsonl", "data/a/2.jsonl", "data/other.jsonl", "saved/x.parquet"):
        (tmp_path / name).write_text("raise SystemExit")
    (folder / "sub" / "one.yaml").write_text(
        "include: ../../shared/_base\ntask: one\nprocess_docs: !function utils.process\ndataset_path: saved\n"
    )
    (tmp_path / "shared" / "_base").write_text(
        "include: _base\ndataset_kwargs: {data_files: {test: [data/a/*.jsonl, https://example.org/z.jsonl]}}\n"
    )
    (folder / "group.yaml").write_text("group: all\ntask: [{task: two, dataset_kwargs: {data_dir: data/b}}]\n")
    (folder / "broken.yaml").write_text("task: [")
    monkeypatch.chdir(tmp_path)
    found = {str(file.resolve().relative_to(tmp_path)) for file in task_files(folder)}
    inside = {"tasks/sub/utils.py", "tasks/sub/one.yaml", "tasks/group.yaml", "tasks/broken.yaml"}
    assert found == inside | {"shared/_base", "data/a/1.jsonl", "data/a/2.jsonl", "data/b", "saved"}
