"""`fusiontree eval`."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fusiontree import load
from fusiontree.artifacts import EvalReport
from fusiontree.cli import main
from fusiontree.eval.eval_llm import evaluate_perplexity
from fusiontree.eval.text_tasks import evaluate_tasks
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


def test_tasks_are_written_into_the_texts_and_their_answers_reported(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(corpus / "eval.jsonl")

    def evaluated(name: str, *options: str) -> EvalReport:
        arguments = ["eval", str(folder), "--data", data, "--device", "cpu", "--out", str(tmp_path / name), *options]
        assert main(arguments) == 0
        return EvalReport.load(tmp_path / name / "eval_report.json")

    plain = evaluated("plain")
    assert plain.tasks is None
    assert "needle" not in capsys.readouterr().out
    report = evaluated("tasks", "--tasks", "structured, needle")
    shown = " ".join(capsys.readouterr().out.split())
    assert (report.loss, report.tokens) == (plain.loss, plain.tokens)  # that of the texts as they are
    expected = evaluate_tasks(load(folder, device="cpu"), Texts([data]), name="tiny")
    assert report.tasks == expected
    assert f"Tasks in {expected.documents} documents (seed 0)" in shown
    for result in expected.results:
        cells = ("all", result.answers, f"{100 * result.right:.1f} %", f"{result.loss:.4f}")
        assert " │ ".join(map(str, (result.task, *cells))) in shown
        assert f"{result.by_distance[-1].start} – {result.by_distance[-1].end - 1} │" in shown
    pieces = evaluated("pieces", "--tasks", "needle,structured", "--piece", "20").tasks
    assert pieces is not None
    for one, other in zip(expected.results, pieces.results, strict=True):
        assert (one.answers, one.right, one.tokens) == (other.answers, other.right, other.tokens)
        assert other.loss == pytest.approx(one.loss, abs=1e-5)
    other_seed = evaluated("seed", "--tasks", "needle", "--seed", "1").tasks
    assert other_seed == evaluate_tasks(load(folder, device="cpu"), Texts([data]), ["needle"], name="tiny", seed=1)
    assert other_seed.results != expected.results[:1]


def test_what_was_skipped_is_said_once_though_the_texts_are_read_twice(
    folder: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{broken\n" + (corpus / "eval.jsonl").read_text())
    assert main(["eval", str(folder), "--data", str(data), "--device", "cpu", "--tasks", "needle"]) == 0
    assert caplog.text.count("1 record skipped") == 1
    assert EvalReport.load(folder / "eval_report.json").settings["skipped"] == {"broken JSON": 1}


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
        (
            ["MODEL", "--data", "DATA", "--tasks", "needel"],
            "--tasks: there is no task 'needel'; did you mean 'needle'?",
        ),
        (["MODEL", "--data", "DATA", "--tasks", "mqar"], "--tasks: there is no task 'mqar'; there are needle and str"),
        (["MODEL", "--data", "DATA", "--tasks", ","], "--tasks names no task; there are needle and structured"),
        (
            ["MODEL", "--data", "SHORT", "--tasks", "needle"],
            "none of the 1 documents of the evaluation data has the 32",
        ),
        (["WORDS", "--data", "DATA", "--tasks", "needle"], "long-context tasks write numbers into documents, and the "),
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
        "SHORT": tmp_path / "short.jsonl",
        "WORDS": tmp_path / "words",
    }
    names["SHORT"].write_text('{"text": "a lazy dog"}\n')
    save_tiny_model(names["WORDS"], None)
    words = Tokenizer(WordLevel({"<unk>": 0, "fox": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(names["WORDS"])
    save_tiny_model(names["BARE"], None)
    save_tiny_model(names["LEARNED"], corpus / "tokenizer", srte_encoding="learned")
    capsys.readouterr()
    assert main(["eval", *(str(names.get(word, word)) for word in arguments)]) == 2
    shown = capsys.readouterr()
    assert not list(tmp_path.rglob("eval_report.json"))
    assert shown.err.startswith("error: " + sentence.replace("MODEL", str(names["BARE"])))
    assert shown.err.count("\n") == 1
