"""`fusiontree eval`."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree import load
from fusiontree.artifacts import EvalReport
from fusiontree.cli import main
from fusiontree.eval.eval_llm import evaluate_perplexity
from fusiontree.eval.texts import Texts
from tiny_models import save_tiny_model


@pytest.fixture
def folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSIONTREE_CACHE", str(tmp_path / "cache"))
    return save_tiny_model(tmp_path / "model", corpus / "tokenizer")


def test_it_prints_the_report_and_leaves_it_with_the_model(
    folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(corpus / "eval.jsonl")
    assert main(["eval", str(folder), "--data", data, "--device", "cpu", "--by-position"]) == 0
    shown = capsys.readouterr()
    expected = evaluate_perplexity(load(folder, device="cpu"), Texts([data]), name="tiny")
    report = EvalReport.load(folder / "eval_report.json")
    assert (report.model, report.data, report.tokens) == (str(folder), [data], expected.tokens)
    assert report.loss == pytest.approx(expected.loss, abs=1e-6)
    assert (folder / "perplexity_by_position.png").read_bytes().startswith(b"\x89PNG")
    assert f"{report.perplexity:.3f}" in shown.out
    assert "0 – 63" in shown.out
    assert str(folder / "eval_report.json") in shown.out
    load(folder, device="cpu")  # what was written there is not in the way


def test_several_files_behind_one_option_and_another_folder(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox")
    files = [str(corpus / "eval.jsonl"), str(text)]
    options = ["--device", "cpu", "--out", str(tmp_path / "out"), "--max-tokens", "100", "--mixed-precision", "bf16"]
    assert main(["eval", str(folder), *options, "--data", *files]) == 0
    assert EvalReport.load(tmp_path / "out" / "eval_report.json").data == files
    assert not (folder / "eval_report.json").exists()
    assert "0 – 63" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--data", "DATA"], "model folder nowhere does not exist"),
        (["MODEL", "--data", "missing.jsonl"], "--data: missing.jsonl does not exist"),
        (["MODEL", "--data", "*.nothing"], "--data: no file matches *.nothing"),
        (["MODEL", "--data", "EMPTY"], "--data: "),
        (["MODEL", "--data", "DATA", "--out", "EMPTY"], "--out "),
        (["MODEL", "--data", "DATA", "--out", "EMPTY/sub"], "--out: the directory "),
        (["MODEL"], "Missing option '--data'"),
        (["MODEL", "--data", "DATA", "--mixed-precision", "fp8"], "--mixed-precision must be bf16 or no, got 'fp8'"),
        (["BARE", "--data", "DATA"], "MODEL holds no tokenizer"),
        (["LEARNED", "--data", "DATA"], "position 247 lies past the learned time encoding of 96 positions"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path,
    corpus: Path,
    tmp_path: Path,
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    names = {
        "MODEL": folder,
        "DATA": corpus / "train.jsonl",
        "EMPTY": tmp_path / "empty.jsonl",
        "EMPTY/sub": tmp_path / "empty.jsonl" / "sub",
        "BARE": tmp_path / "bare",
        "LEARNED": tmp_path / "learned",
    }
    save_tiny_model(names["BARE"], None)
    save_tiny_model(names["LEARNED"], corpus / "tokenizer", srte_encoding="learned")
    capsys.readouterr()
    assert main(["eval", *(str(names.get(word, word)) for word in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: " + sentence.replace("MODEL", str(names["BARE"])))
    assert shown.err.count("\n") == 1
