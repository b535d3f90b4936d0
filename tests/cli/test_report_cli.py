"""`fusiontree report` as a reader meets it: what it shows, that it needs nothing else, what it says of broken runs."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import fusiontree
from fusiontree import HybridLanguageModel
from fusiontree.artifacts import (
    BenchReport,
    CodeReport,
    EvalReport,
    HarnessResult,
    LayerDecision,
    ModelFigures,
    MQARReport,
    PasskeyReport,
    PositionLoss,
    PrunePlan,
    RunManifest,
    ShapeFigures,
)
from fusiontree.cli import main
from fusiontree.eval.columns import differences, read_columns
from fusiontree.eval.figures import plot_perplexity_by_position
from fusiontree.plots import plot_passkeys

VOID = {"meta", "input", "img", "br", "wbr"}


class Page(HTMLParser):
    """Tags with their attributes, the text outside styles, and the cells of each table's rows by the first one."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._cells: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self._cells = []
        if tag in ("td", "th"):
            self._cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "tr":
            self.rows.setdefault(self._cells[0], self._cells[1:])

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data
            if "td" in self._open[-1:] or "th" in self._open[-1:]:
                self._cells[-1] += data


@pytest.fixture(scope="module")
def runs(run_settings, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in a few settings; the first is evaluated and records its gates."""
    folder = tmp_path_factory.mktemp("runs")
    first = run_settings(
        system={"peak_tflops": 0.5, "device": "cpu", "num_threads": 1}, output_dir=str(folder / "first")
    )
    second = run_settings(
        model={"num_layers": 3},
        training={"learning_rate": 1e-3, "max_steps": 4},
        gate_monitor={"enabled": False},
        output_dir=str(folder / "second"),
    )
    for sections in (first, second):
        fusiontree.train(sections)
    EvalReport(
        model="first",
        data=["held-out.jsonl"],
        tokens=4321,
        loss=2.5,
        perplexity=12.182,
        by_position=[PositionLoss(start=2 ** (i - 1), end=2**i, tokens=9, loss=3 - i / 4) for i in range(1, 7)],
        settings={"bits_per_byte": 1.2345, "documents": 17, "measured": "every token once"},
        passkeys=PasskeyReport(
            lengths=[256, 1024], depths=[0, 1], rows=8, digits=5, seed=0, filler=[], right=[[0.5, 0.25], [1, 0.75]]
        ),
        mqar=MQARReport(
            lengths=[64, 128], pairs=[4, 16], rows=8, ids=512, seed=0, right=[[1, 0.5], [0.5, 0]], loss=[[1, 2], [3, 4]]
        ),
        code=CodeReport(
            data=["a.py"],
            files=1,
            unreadable=0,
            functions=4,
            tokens=40,
            loss=1.5,
            next_line_right=0.25,
            next_line_similarity=0.625,
        ),
        harness={"birds": [HarnessResult(task="birds", metrics={"acc": 0.75}, errors={"acc": 0.0625}, samples=8)]},
    ).save(folder / "first" / "eval_report.json")
    figures = {"parameters": 5, "parameter_bytes": 2_500_000, "state_bytes": 12_300, "first_token_seconds": 0.0125}
    speeds = {"prefill_tokens_per_second": 4321.0, "decode_tokens_per_second": 98.76}
    more = speeds | {"state_bytes": 45_600, "first_token_seconds": 0.5, "decode_tokens_per_second": 222.2}
    BenchReport(
        settings={"context": 512, "batch": 1, "dtype": "bfloat16"},
        machine={"processor": "abacus", "threads": 2},
        models=[
            ModelFigures(name="second", **figures, **speeds, more=[ShapeFigures(context=4096, batch=8, **more)]),
            ModelFigures(name="llama", **(figures | {"state_bytes": 98_700}), **speeds),
        ],
    ).save(folder / "second" / "bench.json")
    return [folder / "first", folder / "second"]


def report(*arguments: Any) -> int:
    return main(["report", *map(str, arguments)])


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_runs_side_by_side(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert report(*runs, "-o", out) == 0
    assert capsys.readouterr().out.strip() == str(out)
    page = Page(out)
    last = [[row for row in metrics(run) if key in row][-1] for run in runs for key in ("eval_loss", "lm_loss")]
    assert page.rows["evaluation loss, last"] == [f"{row['eval_loss']:.4f}" for row in last[::2]]
    assert page.rows["training loss"] == [f"{row['lm_loss']:.4f}" for row in last[1::2]]
    assert page.rows["tokens"] == [f"{row['tokens']:,}" for row in last[1::2]]
    assert page.rows["steps"] == ["6 of 6", "4 of 4"]
    assert page.rows["peak memory, GiB"] == [f"{row['peak_memory_gib']:.2f}" for row in last[1::2]]
    assert page.rows["model FLOP utilisation"][0].endswith("%") and page.rows["model FLOP utilisation"][1] == "–"
    models = [HybridLanguageModel.from_pretrained(run / "latest") for run in runs]
    assert page.rows["parameters"] == [f"{model.num_parameters():,}" for model in models]
    # What was set differently, and nothing else.
    assert differences(read_columns(runs)) == [
        *("model.num_layers", "training.max_steps", "training.learning_rate"),
        *("gate_monitor.enabled", "system.peak_tflops"),
    ]
    assert page.rows["training.learning_rate"] == ["0.003", "0.001"]
    assert page.rows["gate_monitor.enabled"] == ["true", "false"]
    # The last evaluation, the plan, and where it all comes from.
    assert page.rows["loss, nats per token"] == ["2.5000", "–"] and page.rows["bits per byte"] == ["1.2345", "–"]
    assert page.rows["Python: next lines right"] == ["25.0%", "–"]
    assert page.rows["passkeys found"] == ["75% in 256, 50% in 1,024", "–"]
    assert page.rows["answers found in associative recall (MQAR)"] == ["75% in 64, 25% in 128", "–"]
    assert page.rows["birds: acc"] == ["0.7500 ± 0.0625", "–"]
    # Where a model was measured beside others, these stand in columns at the end.
    assert page.rows["weights, MB"] == ["–", "2.50", "2.50"]
    assert page.rows["decoding, tokens/s"] == ["–", "98.8", "98.8"]
    assert page.rows["state of one sequence, kB"] == ["–", "12.3", "98.7"] and "llama beside second" in page.text
    assert page.rows["4,096 tokens x 8: state of one, kB"] == ["–", "45.6", "–"]
    assert page.rows["4,096 tokens x 8: first token, ms"] == ["–", "500.0", "–"]
    assert page.rows["4,096 tokens x 8: decoding, tokens/s"] == ["–", "222.2", "–"]
    assert page.rows["machine"] == ["–", *["abacus, 2 threads"] * 2] and "training, tokens/s" not in page.rows
    # The grids, cell by cell: a row for each depth, or number of pairs.
    assert page.rows["depth"] == ["256", "1,024"] and page.rows["pairs"] == ["64", "128"]
    assert (page.rows["0%"], page.rows["100%"]) == (["50%", "25%"], ["100%", "75%"])
    assert (page.rows["4"], page.rows["16"]) == (["100%", "50%"], ["50%", "0%"])
    assert "What would be pruned" in page.text and "Would be pruned by gate thresholds" in page.text
    manifest = RunManifest.load(runs[0] / "manifest.json")
    assert page.rows["revision"][0] == (manifest.git_revision or "installed package")
    assert page.rows["torch"][0] == manifest.versions["torch"]
    assert page.rows["data fingerprint"][0] == manifest.data_fingerprint
    # Every figure says how it was measured.
    for section in page.source.split("<section>")[1:]:
        assert ("<svg" not in section) or 'class="note"' in section


def test_the_page_needs_no_other_file_and_runs_nothing(runs: list[Path], tmp_path: Path) -> None:
    assert report(*runs, "-o", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert (value or "").startswith("data:")
    assert "url(" not in page.source and "@import" not in page.source
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy
    assert any(a.get("name") == "viewport" for tag, a in page.tags if tag == "meta")


def test_curves_over_steps_tokens_and_time(runs: list[Path]) -> None:
    """An evaluation stands at the tokens and the time of its step."""
    (column,) = read_columns(runs[:1])
    rows = metrics(runs[0])
    train = {row["step"]: row for row in rows if "lm_loss" in row}
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert column.curve("eval_loss") == [(row["step"], row["eval_loss"]) for row in evaluations]
    assert column.curve("lm_loss", "tokens") == [(row["tokens"], row["lm_loss"]) for row in train.values()]
    for axis in ("tokens", "elapsed"):
        places = [place for place, _ in column.curve("eval_loss", axis)]  # type: ignore[arg-type]
        assert places == pytest.approx([0, train[3][axis], train[6][axis]])


def test_faults_and_resumes_are_shown(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "resumed"
    shutil.copytree(runs[0], run, symlinks=True)
    manifest = RunManifest.load(run / "manifest.json")
    for step in (3, 5):
        settings = manifest.config | {"seed": step}
        manifest = manifest.resumed(settings, step=step, checkpoint=f"{run}/checkpoints/step_0000000{step}")
    manifest.save(run / "manifest.json")
    rows = [row | {"spikes": 2, "skipped_steps": 1} if "lm_loss" in row else row for row in metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report(runs[1], run, "-o", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert page.rows["resumed"] == ["–", "at step 3 with seed=3, at step 5 with seed=5"]
    assert page.rows["loss spikes"] == ["0", "2"] and page.rows["steps left out"] == ["0", "1"]


def test_what_stands_in_files_stays_text(runs: list[Path], tmp_path: Path) -> None:
    evil = "</title></td><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"
    run = tmp_path / "a<b>&\"c'"
    shutil.copytree(runs[0], run, symlinks=True)
    manifest = RunManifest.load(run / "manifest.json")
    versions = manifest.versions | {evil: evil}
    manifest.model_copy(update={"command": evil, "versions": versions}).save(run / "manifest.json")
    evaluation = EvalReport.load(run / "eval_report.json")
    evaluation.model_copy(update={"model": evil, "data": [evil]}).save(run / "eval_report.json")
    plan = json.loads((run / "prune_plan.json").read_text())
    plan["layers"][0]["reason"] = plan["criterion"] = evil
    plan["thresholds"] = {evil: 0.5}
    (run / "prune_plan.json").write_text(json.dumps(plan))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config + f"{json.dumps(evil)}: {json.dumps(evil)}\n")
    assert report(run, runs[1], "-o", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert "script" not in {tag for tag, _ in page.tags} and "img" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) >= 8
    assert run.name in page.text


def test_models_are_columns_too(runs: list[Path], tmp_path: Path) -> None:
    checkpoint = runs[0] / "checkpoints" / "step_00000003"
    assert report(runs[0], checkpoint, "-o", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert page.rows["kind"] == ["run", "model"] and "first/step_00000003" in page.text
    assert len(set(page.rows["parameters"])) == 1 and page.rows["steps"] == ["6 of 6", "–"]
    assert differences(read_columns([runs[0], checkpoint])) == []
    assert page.rows["model.num_layers"] == ["2", "2"]


def test_figures_of_older_weights_are_told(run_settings, runs: list[Path], tmp_path: Path, corpus: Path) -> None:
    """An evaluation and a bench of step 3 of a run that has gone on to step 6."""
    run = tmp_path / "run"
    shutil.copytree(runs[1], run, symlinks=True)
    (run / "eval_report.json").unlink(missing_ok=True)
    checkpoint, page = run / "checkpoints" / "step_00000003", tmp_path / "page.html"
    assert main(["eval", str(checkpoint), "--data", str(corpus / "eval.jsonl"), "--out", str(run)]) == 0
    bench = ["--context", "8", "--new-tokens", "2", "--rounds", "1", "--train-batch", "0", "--dtype", "float32"]
    assert main(["bench", str(checkpoint), *bench, "--device", "cpu", "--out", str(run)]) == 0
    assert report(run, "-o", page) == 0
    assert Page(page).text.count("run: of step 3, the run is at step 4.") == 2
    for kind, name in ((EvalReport, "eval_report.json"), (BenchReport, "bench.json")):
        found = kind.load(run / name)
        assert found.step == 3
        found.model_copy(update={"step": 4}).save(run / name)
    assert report(run, "-o", page) == 0
    assert "the run is at step" not in Page(page).text


def test_figures_that_are_no_numbers_are_told(runs: list[Path], tmp_path: Path) -> None:
    run, nan = tmp_path / "run", math.nan
    shutil.copytree(runs[0], run, symlinks=True)
    evaluation = EvalReport.load(run / "eval_report.json")
    positions = [PositionLoss(start=0, end=64, tokens=1, loss=nan), PositionLoss(start=64, end=128, tokens=1, loss=2)]
    changes: dict[str, Any] = {"loss": nan, "perplexity": math.inf, "by_position": positions}
    assert evaluation.passkeys is not None
    changes["passkeys"] = evaluation.passkeys.model_copy(update={"right": [[nan, 0.25], [1, 0.75]]})
    changes["harness"] = {"birds": [HarnessResult(task="birds", metrics={"acc": nan}, errors={"acc": nan})]}
    broken = evaluation.model_copy(update=changes)
    broken.save(run / "eval_report.json")
    assert report(run, "-o", tmp_path / "page.html") == 0
    page = Page(tmp_path / "page.html")
    assert page.rows["loss, nats per token"] == ["not a number"] and page.rows["perplexity per token"] == ["infinite"]
    assert page.rows["birds: acc"] == ["not a number ± not a number"]
    assert page.rows["passkeys found"] == ["not a number in 256, 50% in 1,024"]
    assert page.rows["0%"] == ["not a number", "25%"] and "/nan)" not in page.source
    assert "nan" not in page.text.lower().split()
    for drawn in (positions[:1], positions):
        shown = broken.model_copy(update={"by_position": drawn})
        picture = plot_perplexity_by_position(shown, tmp_path / "picture.png")
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert broken.passkeys is not None
    assert plot_passkeys(broken.passkeys, tmp_path / "passkeys.png").stat().st_size > 5000


def test_what_a_run_does_not_have_is_left_out(runs: list[Path], tmp_path: Path) -> None:
    """An older run without operations and memory, one that has only begun, and both beside a whole one."""
    older, begun = tmp_path / "older", tmp_path / "begun"
    shutil.copytree(runs[1], older, symlinks=True)
    new_keys = ("tflops", "mfu", "peak_memory_gib")
    kept = [{k: v for k, v in row.items() if k not in new_keys} for row in metrics(older)]
    # The last row is still being written.
    (older / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept) + '{"step": 9, "lm_')
    begun.mkdir()
    for name in ("config.yaml", "manifest.json"):
        shutil.copy(runs[1] / name, begun)
    (begun / "metrics.jsonl").touch()
    for paths in ([older], [begun], [older, begun, *runs]):
        assert report(*paths, "-o", tmp_path / "page.html") == 0
        page = Page(tmp_path / "page.html")
        assert ("TFLOP/s per device" in page.rows) == (len(paths) > 1)
        assert "nan" not in page.text.lower().split()
    assert page.rows["steps"] == ["4 of 4", "–", "6 of 6", "4 of 4"]


def test_runs_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "first"
    shutil.copytree(runs[0], other, symlinks=True)
    assert report(runs[0], other, "-o", tmp_path / "page.html") == 0
    assert {str(runs[0]), str(other)} <= set(re.findall(r"<li [^>]*>([^<]+)</li>", Page(tmp_path / "page.html").source))


def broken(name: str, content: str | None) -> Any:
    def change(run: Path) -> None:
        if content is None:
            (run / name).unlink()
        else:
            (run / name).write_text(content)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (shutil.rmtree, "{run} does not exist; name the directory of a training run or of a model"),
        (broken("metrics.jsonl", None), "{run} is not the directory of a training run (it holds no metrics.jsonl) nor"),
        (broken("metrics.jsonl", '{"step": 1}\n{"step"\n{"step": 2}\n'), "{run}/metrics.jsonl:2 is not JSON"),
        (broken("metrics.jsonl", '{"lm_loss": 1}\n'), "{run}/metrics.jsonl:1 is not a row of metrics"),
        (broken("metrics.jsonl", "[1]\n"), "{run}/metrics.jsonl:1 is not a row of metrics"),
        (broken("gates.jsonl", '{"kind": "other"}\n'), "{run}/gates.jsonl:1 holds 'other'"),
        (broken("manifest.json", '{"kind": "run_'), "{run}/manifest.json is truncated or not JSON"),
        (broken("manifest.json", None), "{run}/manifest.json does not exist"),
        (broken("config.yaml", "a: [1"), "config file {run}/config.yaml"),
        (broken("prune_plan.json", "{}"), "{run}/prune_plan.json holds something else"),
        (broken("eval_report.json", "{"), "{run}/eval_report.json is truncated or not JSON"),
        (broken("latest/config.json", "{"), "{run}/latest/config.json is truncated or not JSON"),
        (
            broken("latest/model.safetensors", "short"),
            "{run}/latest/model.safetensors is truncated or not a safetensor",
        ),
    ],
)
def test_a_broken_run_is_one_sentence(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run, symlinks=True)
    change(run)
    assert report(runs[1], run, "-o", tmp_path / "page.html") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: " + said.format(run=run))
    assert not (tmp_path / "page.html").exists()


def test_other_mistakes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(runs[0], runs[0], "-o", tmp_path / "page.html") == 2
    assert "is named twice" in capsys.readouterr().err
    assert report(runs[0], "-o", tmp_path) == 2
    assert f"--out {tmp_path} is a directory; name a file" in capsys.readouterr().err
    assert report() == 2
    capsys.readouterr()
    assert report(runs[0], "-o", "/proc/page.html") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: /proc/page.html: no such file or folder")


@pytest.mark.parametrize("command", ["report", "generate"])
def test_a_pipe_is_written_to(command: str, runs: list[Path], tmp_path: Path) -> None:
    pipe, source = tmp_path / "pipe", tmp_path / "prompts.jsonl"
    os.mkfifo(pipe)
    source.write_text('{"prompt": "a"}\n')
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text(encoding="utf-8")), daemon=True)
    reader.start()
    given = ["--jsonl", source, "-n", "2", "--device", "cpu", "--out", pipe]
    assert main([command, str(runs[0]), *map(str, given if command == "generate" else ["-o", pipe])]) == 0
    reader.join(timeout=30)
    assert found[0].startswith("<!DOCTYPE html>" if command == "report" else '{"prompt": "a", "text": ')
    assert pipe.is_fifo()


@pytest.fixture(scope="module")
def cut(runs: list[Path]) -> list[Path]:
    """A run, what is left of it without a branch, and that healed."""
    folder, width = runs[0].parent, HybridLanguageModel.from_pretrained(runs[0] / "latest").config.hidden_size
    layers = [LayerDecision(keep="mamba", reason="", constant=[0.0] * width), LayerDecision(keep="both", reason="")]
    PrunePlan(criterion="test", thresholds={}, source="test", layers=layers).save(folder / "plan.json")
    export, healed = folder / "export", folder / "healed"
    options = ["--context", "32", "--device", "cpu"]
    assert main(["export", str(runs[0]), str(folder / "plan.json"), str(export), *options]) == 0
    assert main(["heal", str(export), "training.max_steps=3", f"output_dir={healed}"]) == 0
    return [runs[0], export, healed]


# What of a page lies where it cannot be seen, and which tables of few columns scroll.
LOOK = """
    const page = document.querySelector("iframe").contentDocument;
    const box = part => part.getBoundingClientRect();
    for (const part of page.querySelectorAll("details")) part.open = true;
    const charts = [...page.querySelectorAll("svg")].map(svg => box(svg).width);
    const shown = [...page.querySelectorAll(".choice > .charts")].map(pane => pane.offsetHeight > 0);
    const cut = [...page.querySelectorAll("svg text")].filter(text => {
        const [outer, inner] = [box(text.ownerSVGElement), box(text)];
        return inner.left < outer.left - 0.5 || inner.right > outer.right + 0.5
            || inner.top < outer.top - 0.5 || inner.bottom > outer.bottom + 0.5;
    }).map(text => text.textContent);
    const scrolling = [...page.querySelectorAll(".wide")].filter(wide => {
        return wide.querySelector("tr").children.length <= 3 && wide.scrollWidth > wide.clientWidth;
    }).map(wide => wide.textContent.slice(0, 200));
    document.body.textContent = JSON.stringify({
        width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight, charts, shown, cut,
        scrolling, text: box(page.querySelector("svg text")).height});
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["runs", "cut"])
def test_a_browser_shows_all_of_it(request: pytest.FixtureRequest, tmp_path: Path, name: str, width: int) -> None:
    """Nothing is wider than the window, every chart has a size and its labels inside, tables of two runs need no
    scrolling, and one of the three axes is in view.

    Leaves a picture of the whole page to look at in artefacts/.
    """
    assert report(*request.getfixturevalue(name), "-o", tmp_path / "page.html") == 0
    frame = f'<iframe src="page.html" width="{width}" height="900" style="border:0"></iframe>'
    (tmp_path / "look.html").write_text(f"<body>{frame}<script>onload = () => {{{LOOK}}}</script></body>")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]

    def browse(page: str, *more: str) -> str:
        command = ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", *more, f"file://{tmp_path / page}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout

    found = json.loads(re.findall(r"\{.*\}", browse("look.html", "--dump-dom"))[-1])
    picture = Path(__file__).parents[2] / "artefacts" / f"report_{name}_{width}.png"
    picture.parent.mkdir(exist_ok=True)
    picture.unlink(missing_ok=True)
    height = found["height"]  # with all that can be opened, so there is room for what is not
    (tmp_path / "show.html").write_text(f'<body style="margin:0">{frame.replace("900", str(height))}</body>')
    browse("show.html", f"--screenshot={picture}", f"--window-size={max(width, 500)},{height}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert found["width"] <= width
    assert found["shown"] == [True, False, False]
    visible = [chart for chart in found["charts"] if chart > 0]
    assert len(visible) >= 8 and min(visible) > 250
    assert found["text"] > 10
    assert found["cut"] == []
    assert name != "runs" or found["scrolling"] == []
