"""`fusiontree quickstart`: a very small one in a process of its own, away from the repository."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import warm
from fusiontree import load
from fusiontree.artifacts import EvalReport
from fusiontree.cli import main
from fusiontree.cli._quickstart import PROMPTS, QUICKSTART, quickstart_settings
from fusiontree.config import load_yaml
from fusiontree.train.settings import load_run_settings

SCRIPT = Path(sys.executable).with_name("fusiontree")
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = [
    *("--corpus-bytes", "300000", "--vocab-size", "320"),
    *("model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.window_size=8"),
    *("model.mamba_head_dim=8", "model.mamba_state_size=8", "model.gate_rank=4", "model.srte_rank=8"),
    *("training.batch_size=4", "training.max_seq_length=64", "training.max_steps=12", "training.warmup_steps=2"),
    *("training.eval_interval=6", "training.eval_batches=4", "training.log_interval=2", "gate_monitor.interval=3"),
]


class Page(HTMLParser):
    """What a browser would load, and the text it would show."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset") and value]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def start(folder: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FUSIONTREE_CACHE": str(folder / "cache")}
    return subprocess.run(
        [warm.fusiontree(), "quickstart", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of a small quickstart, and what it printed."""
    folder = tmp_path_factory.mktemp("away")
    done = start(folder, "--out", "my run", *SMALL, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "my run", done.stdout


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_tells_what_it_did_and_where_to_go_on(finished: tuple[Path, str]) -> None:
    run, shown = finished
    losses = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.3
    assert f"validation loss {' -> '.join(f'{loss:.3f}' for loss in losses)}" in shown
    assert re.search(r"^set-up \d+ s$", shown, re.MULTILINE)
    assert re.search(r"^training \d+ s \+ evaluation \d+ s = \d+\.\d minutes", shown, re.MULTILINE)
    assert "my run/index.html" in shown
    assert "fusiontree generate 'my run' --prompt" in shown


def test_it_leaves_everything_in_the_run_directory(finished: tuple[Path, str]) -> None:
    run, _ = finished
    report = EvalReport.load(run / "eval_report.json")
    assert report.settings["documents"] > 3
    assert len(report.by_position) > 2
    samples = (run / "sample.txt").read_text()
    assert all(prompt in samples for prompt in PROMPTS)
    for name in ("learning_curve", "gates_by_step", "gates_by_channel", "perplexity_by_position"):
        assert (run / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    model = load(run, device="cpu")
    assert len(model.tokenizer) == 320
    assert model.config.layer_branches is None and model.config.srte_encoding == "sincos"


def test_the_page_stands_alone_and_shows_all_of_it(finished: tuple[Path, str]) -> None:
    run, _ = finished
    content = (run / "index.html").read_text()
    page = Page(content)
    assert page.open == []
    assert len(page.links) == 4
    for link in page.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    assert not re.search(r"url\(|@import|<script|<link", content)
    assert 'name="viewport" content="width=device-width' in content
    assert "prefers-color-scheme: dark" in content
    text = "".join(page.text)
    report = EvalReport.load(run / "eval_report.json")
    last = [row for row in metrics(run) if "eval_loss" in row][-1]
    for fact in (
        f"{last['eval_loss']:.4f}",
        f"{report.perplexity:.1f}",
        f"{report.tokens:,} tokens of {report.settings['documents']} whole documents",
        report.settings["measured"],
        "averaged over the tokens of 2 steps",
        "recorded every 3 steps",
        "gate_rank",
        *(prompt for prompt in PROMPTS),
    ):
        assert fact in text
    first_sample = (run / "sample.txt").read_text().split("\n" + "-" * 80 + "\n")[0]
    assert first_sample in text  # nothing of the model's text is taken for markup


def test_run_again_it_goes_on_from_what_is_there(finished: tuple[Path, str], capfd: pytest.CaptureFixture[str]) -> None:
    run, _ = finished
    before, sample = metrics(run), (run / "sample.txt").read_text()
    tokenizer = (run / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    (run / "index.html").unlink()
    assert main(["quickstart", "--out", str(run), *SMALL, f"data.cache_dir={run.parent / 'cache'}"]) == 0
    assert metrics(run) == before
    assert (run / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer
    assert (run / "sample.txt").read_text() == sample
    assert (run / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--vocab-size", "400"], "was begun with --corpus-bytes 300000 --vocab-size 320: repeat these"),
        (["output_dir=elsewhere"], "give the run directory as --out, not as output_dir="),
        (["training.eval_interval=0"], "set training.eval_interval to 1 or more"),
        (["data.eval_paths=[]"], "leave data.eval_paths as it is"),
        (["training.max_step=5"], "training.max_step is not a known setting; did you mean training.max_steps?"),
        (["model.num_heads=5"], "`hidden_size` 32 is not a multiple of `num_heads` 5"),
    ],
)
def test_bad_input_is_one_sentence(
    finished: tuple[Path, str], arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run, _ = finished
    assert main(["quickstart", "--out", str(run), *SMALL, *arguments]) == 2
    shown = capfd.readouterr().err
    assert sentence in shown
    assert shown.count("\n") == 1


def test_what_cannot_even_begin(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["quickstart", "--out", str(tmp_path / "file")]) == 2
    assert "file is a file; name a folder for the run" in capfd.readouterr().err
    assert main(["quickstart", "--out", str(tmp_path / "a"), "--corpus-bytes", "100"]) == 2
    assert "too few to hold 5% out" in capfd.readouterr().err
    assert main(["quickstart", "--out", str(tmp_path / "b"), "--corpus-bytes", "300000", "--vocab-size", "9"]) == 2
    assert "a vocabulary of 9 is too small" in capfd.readouterr().err
    assert not (tmp_path / "b" / "corpus").exists()


def test_its_settings_are_those_of_the_shipped_file() -> None:
    shipped = load_run_settings(CONFIG)
    assert quickstart_settings(Path(shipped.output_dir), []) == shipped
    assert list(QUICKSTART) == list(load_yaml(CONFIG))


@pytest.mark.slow
def test_the_whole_of_it_takes_less_than_six_minutes(tmp_path: Path) -> None:
    started = time.perf_counter()
    done = start(tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    shown = re.search(r"^training (\d+) s \+ evaluation (\d+) s", done.stdout, re.MULTILINE)
    assert shown is not None
    assert sum(map(int, shown.groups())) < 360
    run = tmp_path / "runs" / "quickstart"
    losses = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.6 * losses[0]
    assert time.perf_counter() - started < 480
