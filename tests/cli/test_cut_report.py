"""`fusiontree report` of a cut: parent, export, healed export, random cut, plain smaller model, the parent trained on:
each told from the others, with what `eval`, `bench` and `export` measured of them."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_report_cli import Page

import fusiontree
from fusiontree.artifacts import BenchReport, EvalReport, PrunePlan, RunManifest
from fusiontree.cli import main
from fusiontree.eval.gate_guide import rank_correlation

NAMES = ["parent", "cut", "healed", "random", "plain", "continued"]
DEVICE = ["--device", "cpu"]
BENCH = ["--context", "32", "--new-tokens", "2", "--train-batch", "0", "--rounds", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folders(run_settings, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All six, evaluated on the same text but for the plain one, which sees half of it."""
    root = tmp_path_factory.mktemp("cuts")
    folders = {name: root / name for name in NAMES}

    def train(name: str, steps: int, layers: int, **training: Any) -> None:
        training |= {"max_steps": steps, "save_interval": 0, "eval_interval": steps, "eval_batches": 1}
        output = {"output_dir": str(folders[name]), "gate_monitor": {"enabled": False}}
        fusiontree.train(run_settings(model={"num_layers": layers}, training=training, **output))

    train("parent", 8, 2)
    train("plain", 9, 1)
    train("continued", 1, 2, init_from=str(folders["parent"]))
    data = ["--data", str(corpus / "train.jsonl")]
    quick = ["--context", "32", "--rounds", "1", "--tokens", "1500", "--length", "48", *DEVICE]
    for name, criterion in (("cut", "ablation"), ("random", "random")):
        plan = ["--target", "parameters=0.95x", "--criterion", criterion, "--out", str(root / f"{name}.json")]
        assert main(["plan", str(folders["parent"]), *data, *plan, *quick]) == 0
        into = [str(root / f"{name}.json"), str(folders[name]), "--context", "32", *DEVICE]
        assert main(["export", str(folders["parent"]), *into]) == 0
    more = ["training.max_steps=1", f"output_dir={folders['healed']}"]
    assert main(["heal", str(folders["cut"]), *more]) == 0
    tasks = ["--tasks", "needle,mqar", "--lengths", "32", "--pairs", "2", "--rows", "2", *DEVICE]
    for name, folder in folders.items():
        limit = ["--max-tokens", "50"] if name == "plain" else []
        assert main(["eval", str(folder), "--data", str(corpus / "eval.jsonl"), *tasks, *limit]) == 0
    for name in ("parent", "plain"):
        assert main(["bench", str(folders[name]), *BENCH, *DEVICE]) == 0
    return folders


def page_of(folders: dict[str, Path], out: Path) -> Page:
    assert main(["report", *map(str, folders.values()), "-o", str(out)]) == 0
    return Page(out)


def test_each_is_told_from_the_others_and_measured(folders: dict[str, Path], tmp_path: Path) -> None:
    page = page_of(folders, tmp_path / "page.html")
    assert page.rows["is"] == [
        *("parent", "cut from parent by ablation", "healed from cut", "random cut from parent"),
        *("plain model", "continued from parent"),
    ]
    # The counters of the runs: what one was made from has learned counts too.
    rows = [json.loads(line) for line in (folders["plain"] / "metrics.jsonl").read_text().splitlines()]
    step = max(row.get("tokens", 0) for row in rows) // 9
    assert page.rows["tokens trained on, in all"] == [f"{step * steps:,}" for steps in (8, 8, 9, 8, 9, 9)]
    found = {name: EvalReport.load(folder / "eval_report.json") for name, folder in folders.items()}
    base = found["parent"].loss
    assert page.rows["loss on other text"] == [
        f"{base:.4f}",
        *(f"{found[name].loss:.4f} ({found[name].loss / base - 1:+.1%})" for name in ("cut", "healed", "random")),
        f"{found['plain'].loss:.4f}",  # of less text, so it is held against nothing
        f"{found['continued'].loss:.4f} ({found['continued'].loss / base - 1:+.1%})",
    ]
    assert found["plain"].tokens < found["parent"].tokens
    first = [math.exp(found[name].by_position[0].loss) for name in NAMES]
    assert page.rows["perplexity at 0 – 63"] == [f"{value:,.3f}" for value in first]
    needles = [next(one for one in found[name].tasks.results if one.task == "needle") for name in NAMES]
    assert page.rows["needle found"] == [f"{one.right:.1%} of {one.answers:,}" for one in needles]
    assert page.rows["evaluated with weights in"] == ["float32"] * 6
    assert all(cell.endswith("in 32") for cell in page.rows["associative recall (MQAR) found, by length"])


def test_speed_and_size_are_held_against_the_parent_of_the_same_measurement(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    page = page_of(folders, tmp_path / "page.html")
    costs = RunManifest.load(folders["cut"] / "manifest.json").config["costs"]
    benches = {name: BenchReport.load(folders[name] / "bench.json").models[0] for name in ("parent", "plain")}
    ratio = costs["parent"]["decode_seconds"] / costs["export"]["decode_seconds"]
    against = benches["plain"].decode_tokens_per_second / benches["parent"].decode_tokens_per_second
    parent, cut, healed, random, plain, continued = page.rows["decoding, tokens/s"]
    assert parent == f"{1 / costs['parent']['decode_seconds']:,.1f}"
    assert cut == f"{1 / costs['export']['decode_seconds']:,.1f} ({ratio:.2f}x)"
    assert random.endswith("x)") and healed == cut and continued == "–"
    assert plain == f"{benches['plain'].decode_tokens_per_second:,.1f} ({against:.2f}x)"
    memory = [sum(costs[name][f"{part}_bytes"] for part in ("weight", "state")) for name in ("parent", "export")]
    assert page.rows["both, MB"][:2] == [
        f"{memory[0] / 1e6:,.2f}",
        f"{memory[1] / 1e6:,.2f} ({memory[1] / memory[0]:.2f}x)",
    ]
    by = [*["fusiontree export"] * 4, "fusiontree bench", "–"]
    assert page.rows["size and speed by"] == by
    # Once all were measured by the one command, its figures stand beside each other, each against the parent's.
    copies = {name: tmp_path / name for name in NAMES if name in ("cut", "random")}
    for name, folder in copies.items():
        shutil.copytree(folders[name], folder)
        shutil.copy(folders["plain"] / "bench.json", folder)
    benched = {"parent": folders["parent"], **copies, "plain": folders["plain"]}
    page = page_of(benched, tmp_path / "page.html")
    assert page.rows["size and speed by"] == ["fusiontree bench"] * 4
    first = f"{benches['parent'].decode_tokens_per_second:,.1f}"
    assert page.rows["decoding, tokens/s"] == [first, plain, plain, plain]


def test_a_parent_is_found_from_another_directory(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folders["parent"].parent)
    into = ["cut.json", str(tmp_path / "cut"), "--context", "0", *DEVICE]
    assert main(["export", "parent", *into]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["heal", "../cut", "training.max_steps=1", "output_dir=../healed"]) == 0
    (tmp_path / "third").mkdir()
    monkeypatch.chdir(tmp_path / "third")
    page = page_of({"parent": folders["parent"], "cut": Path("../cut"), "healed": Path("../healed")}, Path("page.html"))
    assert page.rows["is"] == ["parent", "cut from parent by ablation", "healed from cut"]


def test_the_gates_are_held_against_the_measured_rise(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = folders["cut"].parent / "cut.json"
    capsys.readouterr()
    assert main(["plan", str(plan), "--show"]) == 0
    shown = capsys.readouterr().out
    evidence = [layer.evidence for layer in PrunePlan.load(plan).layers]
    rises = [layer[f"{branch}_ablation"] for layer in evidence for branch in ("mamba", "attention")]
    gates = [weight for layer in evidence for weight in (layer["gate_mean"], 1 - layer["gate_mean"])]
    shares = [layer[f"{branch}_contribution"] for layer in evidence for branch in ("mamba", "attention")]
    sentence = (
        f"rank correlation with the measured rise of the loss (Spearman, 4 branches): weight by the gate "
        f"{rank_correlation(gates, rises):+.2f}, contribution {rank_correlation(shares, rises):+.2f}"
    )
    assert sentence in shown
    assert page_of(folders, tmp_path / "page.html").text.count(f"R{sentence[1:]}.") == 1  # a random plan measures none


def test_rank_correlation_is_spearmans() -> None:
    # 1 - 6 (sum of squared differences of ranks) / n (n^2 - 1), where no two are equal
    assert rank_correlation([1, 2, 3, 4, 5], [10, 30, 20, 50, 40]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # Equal values have the mean of their ranks: 1.5, 1.5, 3 against 1, 2, 3.
    assert rank_correlation([7, 7, 9], [1, 2, 3]) == pytest.approx(0.5 * 3**0.5)
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
