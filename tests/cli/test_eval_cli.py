"""`fusiontree eval`."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import warm
from fusiontree import load
from fusiontree.artifacts import EvalReport
from fusiontree.cli import main
from fusiontree.eval.eval_llm import evaluate_perplexity
from fusiontree.eval.mqar import evaluate_mqar
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


def test_a_terminal_is_shown_how_far_it_is(folder: Path, corpus: Path) -> None:
    ours, theirs = pty.openpty()
    command = [warm.python(), "-m", "fusiontree", "eval", folder, "--data", corpus / "eval.jsonl", "--device", "cpu"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # as the other end is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    last = shown.decode().rpartition("perplexity")[2]
    assert "━━━━" in last and "100%" in last


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


def test_it_goes_on_where_it_was_interrupted(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, program, path = corpus / "eval.jsonl", tmp_path / "song.py", folder / "eval_report.json"
    program.write_text("def sing():\n    a = 1\n    return a\n")
    options = ["--device", "cpu", "--data", str(data), "--tasks", "passkey,code", "--code", str(program)]
    options += ["--lengths", "64,96", "--depths", "0,1", "--passkeys", "2"]

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fusiontree.eval.eval_llm.evaluate_documents", interrupted)
        assert main(["eval", str(folder), *options]) == 130
    assert capsys.readouterr().err.splitlines() == [
        "the same command goes on after the last part that was measured",
        "interrupted",
    ]
    partial = EvalReport.load(path)
    assert partial.parts.keys() == {"passkeys", "code"} and partial.loss is None
    assert partial.passkeys is not None and partial.passkeys.lengths == [64, 96]
    capsys.readouterr()
    assert main(["eval", str(folder), *options]) == 0
    shown = capsys.readouterr()
    whole = EvalReport.load(path)
    assert whole.parts.keys() == {"passkeys", "code", "perplexity"} and whole.loss is not None
    assert (whole.passkeys, whole.code) == (partial.passkeys, partial.code)
    assert shown.err.count("kept from") == 2
    words = " ".join(shown.out.split())
    assert "Passkeys found, 2 a cell" in words and "1 │ functions, " in words
    assert (folder / "passkeys.png").read_bytes().startswith(b"\x89PNG")
    # All of it is there; what depends on something that has changed is measured again, and nothing but that.
    for changes, kept in (
        ([], ["passkeys", "code", "perplexity"]),
        (["--seed", "1"], ["code", "perplexity"]),
        (["--seed", "1", "--max-tokens", "5"], ["passkeys", "code"]),
        (["--seed", "1", "--max-tokens", "5", "--again"], []),
        (["--seed", "1", "--max-tokens", "5", "--dtype", "bfloat16"], []),
    ):
        assert main(["eval", str(folder), *options, *changes]) == 0
        assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == kept
    program.write_text("def sing():\n    b = 1\n    return b\n")
    arguments = ["eval", str(folder), *options, "--seed", "1", "--max-tokens", "5", "--dtype", "bfloat16"]
    assert main(arguments) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["passkeys", "perplexity"]
    assert main(["eval", str(folder), "--device", "cpu", "--tasks", "passkey", "--lengths", "64"]) == 0
    alone = EvalReport.load(path)
    assert alone.parts.keys() == {"passkeys"} and alone.code is alone.loss is None
    assert (folder / "passkeys.png").exists() and not (folder / "perplexity_by_position.png").exists()


def test_a_model_that_computes_no_numbers_is_not_scored(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, program = save_tiny_model(tmp_path / "broken", corpus / "tokenizer", broken=True), tmp_path / "song.py"
    program.write_text("def sing():\n    a = 1\n    return a\n")
    row = {"question": "the quick", "choices": [" fox", " dog"], "answer": 0}
    (tmp_path / "tasks").mkdir()
    save_harness_task(tmp_path / "tasks", [row])
    lengths = ["--lengths", "64"]
    for options in (
        ["--data", str(corpus / "eval.jsonl")],
        ["--data", str(corpus / "eval.jsonl"), "--tasks", "needle"],
        ["--tasks", "passkey", *lengths],
        ["--tasks", "mqar", "--pairs", "4", *lengths],
        ["--tasks", "code", "--code", str(program)],
        ["--tasks", "lm_eval:birds", "--task-folder", str(tmp_path / "tasks")],
    ):
        capsys.readouterr()
        assert main(["eval", str(folder), "--device", "cpu", "--out", str(tmp_path / "out"), *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith("error: the model's logits are not finite (NaN or infinity): ")
        assert not (tmp_path / "out").exists()


def save_harness_task(folder: Path, rows: list[dict[str, Any]]) -> None:
    """A task named birds, whose data lie beside the folder."""
    data = folder.parent / "birds.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "birds",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "birds.yaml").write_text(json.dumps(task))  # which is YAML too


def test_associative_recall_needs_no_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--device",
        "cpu",
        "--tasks",
        "mqar",
        "--lengths",
        "32,64",
        "--pairs",
        "2,4",
        "--rows",
        "3",
        "--ids",
        "20",
    ]
    assert main(["eval", str(folder), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    report = EvalReport.load(folder / "eval_report.json")
    expected = evaluate_mqar(load(folder, device="cpu"), name="tiny", lengths=[32, 64], pairs=[2, 4], rows=3, ids=20)
    assert report.mqar == expected and report.loss is None
    assert "Associative recall (MQAR), 3 rows a cell: answers found, by pairs and tokens of a row" in shown
    assert f"4 │ {100 * expected.right[1][0]:.0f} % │ {100 * expected.right[1][1]:.0f} %" in shown
    assert (folder / "mqar.png").read_bytes().startswith(b"\x89PNG")
    assert main(["eval", str(folder), *options]) == 0
    assert "mqar: kept from" in capsys.readouterr().err


def test_tasks_of_the_harness(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": "the quick brown", "choices": [" fox", " dog", " bird"], "answer": i % 3} for i in range(6)]
    (tmp_path / "tasks").mkdir()
    save_harness_task(tmp_path / "tasks", rows)
    options = ["--device", "cpu", "--tasks", "lm_eval:birds", "--task-folder", str(tmp_path / "tasks")]
    assert main(["eval", str(folder), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    (result,) = EvalReport.load(folder / "eval_report.json").harness["birds"]
    # The same question each time: each choice is right twice.
    assert result.metrics == {"acc": pytest.approx(1 / 3)} and result.samples == 6
    assert "birds │ acc │ 0.3333 │ 0.2108 │ 6 │ 0" in shown
    assert main(["eval", str(folder), *options]) == 0
    assert "lm_eval:birds: kept from" in capsys.readouterr().err
    (tmp_path / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert main(["eval", str(folder), *options]) == 0
    assert "kept from" not in capsys.readouterr().err
    assert EvalReport.load(folder / "eval_report.json").harness["birds"][0].samples == 3


def test_what_is_kept_outlives_a_part_that_fails(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, path = tmp_path / "tasks", folder / "eval_report.json"
    tasks.mkdir()
    lost = {"task": "lost", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "nowhere.jsonl"}}}
    (tasks / "lost.yaml").write_text(
        json.dumps(lost | {"test_split": "test", "doc_to_text": "a", "doc_to_target": "b"})
    )
    # The harness's own tasks are thousands of files.
    monkeypatch.setattr(
        "fusiontree.eval.lm_eval_adapter.TaskManager",
        lambda include_path, include_defaults=True: TaskManager(include_path=include_path, include_defaults=False),
    )
    options = ["eval", str(folder), "--device", "cpu", "--data", str(corpus / "eval.jsonl")]
    assert main(options) == 0
    before = EvalReport.load(path)
    capsys.readouterr()
    assert main([*options, "--tasks", "needle,lm_eval:typo", "--task-folder", str(tasks)]) == 2
    assert "there is no task 'typo' in " in capsys.readouterr().err
    (tasks / "typo.yaml").write_text("task: typo\ndataset_path: [json\n")
    assert main([*options, "--tasks", "needle,lm_eval:typo", "--task-folder", str(tasks)]) == 2
    assert f"the task file {tasks / 'typo.yaml'}, line 3 is not valid YAML: " in capsys.readouterr().err
    (tasks / "typo.yaml").unlink()
    assert EvalReport.load(path) == before  # said before needle was measured
    assert main([*options, "--tasks", "needle,lm_eval:lost", "--task-folder", str(tasks)]) == 2
    assert "the task 'lost' cannot be loaded: " in capsys.readouterr().err
    after = EvalReport.load(path)
    assert after.parts.keys() == {"tasks in texts", "perplexity"} and after.tasks is not None
    assert (after.loss, after.by_position) == (before.loss, before.by_position)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "--data", "DATA"], "model folder nowhere does not exist"),
        (["MODEL", "--data", "missing.jsonl"], "--data: missing.jsonl does not exist"),
        (["MODEL", "--data", "*.nothing"], "--data: no file matches *.nothing"),
        (["MODEL", "--data", "EMPTY"], "--data: "),
        (["MODEL", "--data", "DATA", "--out", "EMPTY"], "--out "),
        (["MODEL", "--data", "DATA", "--out", "EMPTY/sub"], "--out: the directory "),
        (["MODEL"], "there is nothing to evaluate: give --data FILES, or --tasks passkey, mqar, code or lm_eval:NAME"),
        (["MODEL", "--tasks", "mqar", "--by-position"], "--by-position tabulates the perplexity of texts: give --data"),
        (["MODEL", "--tasks", "needle"], "--tasks needle is written into texts: give --data FILES"),
        (["MODEL", "--tasks", "code"], "--tasks code completes Python functions: give --code FILES"),
        (["MODEL", "--data", "DATA", "--code", "DATA"], "--code is for --tasks code"),
        (["MODEL", "--data", "DATA", "--lengths", "64"], "--lengths is for --tasks passkey or mqar: name"),
        (["MODEL", "--data", "DATA", "--depths", "0"], "--depths is for --tasks passkey: "),
        (["MODEL", "--tasks", "lm_eval:birds", "--passkeys", "8"], "--passkeys is for --tasks passkey: "),
        (["MODEL", "--tasks", "passkey", "--pairs", "4"], "--pairs is for --tasks mqar: name that task"),
        (
            ["MODEL", "--tasks", "mqar", "--lengths", "16", "--pairs", "8"],
            "a row of 16 tokens has room for 1 to 4 pairs",
        ),
        (["MODEL", "--tasks", "mqar", "--ids", "9"], "9 token ids leave 4 keys for 16 pairs: use more ids"),
        (["BARE", "--tasks", "mqar", "--ids", "9999"], "MODEL has a vocabulary of "),
        (
            ["MODEL", "--tasks", "mqar", "--pairs", "0"],
            "--pairs must be a whole number from 1 to",
        ),
        (["MODEL", "--data", "DATA", "--task-folder", "."], "--task-folder is for --tasks lm_eval:NAME: "),
        (["MODEL", "--tasks", "passkey", "--limit", "1"], "--limit is for --tasks lm_eval:NAME: "),
        (["MODEL", "--data", "DATA", "--shots", "0"], "--shots is for --tasks lm_eval:NAME: "),
        (
            ["MODEL", "--tasks", "passkey", "--lengths", "5,x"],
            "--lengths must be a whole number from 1 to 2147483647, or several with commas between, got '5,x'",
        ),
        (["MODEL", "--tasks", "passkey", "--depths", "0,2"], "--depths must be a number from 0 to 1, or several"),
        (["MODEL", "--tasks", "passkey", "--lengths", "0"], "--lengths must be a whole number from 1 to"),
        (["MODEL", "--tasks", "mqar", "--lengths", "9" * 23], "--lengths must be a whole number from 1 to"),
        (["MODEL", "--tasks", "passkey", "--depths", "nan"], "--depths must be a number from 0 to 1, or several"),
        (["MODEL", "--tasks", "passkey", "--lengths", "16"], "a row of 16 tokens is too short for a marker of"),
        (["MODEL", "--tasks", "passkey", "--lengths", "16", "--out", "NEW"], "a row of 16 tokens is too short"),
        (["MODEL", "--tasks", "lm_eval:brids", "--task-folder", "DATA"], "--task-folder "),
        (["MODEL", "--data", "DATA", "--mixed-precision", "fp8"], "--mixed-precision must be bf16 or no, got 'fp8'"),
        (["BARE", "--data", "DATA"], "MODEL holds no tokenizer"),
        (
            ["MODEL", "--data", "DATA", "--tasks", "needel"],
            "--tasks: there is no task 'needel'; did you mean 'needle'?",
        ),
        (
            ["MODEL", "--data", "DATA", "--tasks", "zebra"],
            "--tasks: there is no task 'zebra'; there are needle, structured, ",
        ),
        (
            ["MODEL", "--data", "DATA", "--tasks", ","],
            "--tasks names no task; there are needle, structured, passkey, mqar, code and lm_eval:NAME",
        ),
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
        "NEW": tmp_path / "new" / "sub",
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
    assert not list(tmp_path.rglob("eval_report.json")) and not (tmp_path / "new").exists()
    assert shown.err.startswith("error: " + sentence.replace("MODEL", str(names["BARE"])))
    assert shown.err.count("\n") == 1
