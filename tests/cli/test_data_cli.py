"""`fusiontree data` as a user meets it."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path

import pytest

from fusiontree.cli import main


@pytest.fixture(autouse=True)
def _own_cache_and_wide_terminal(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FUSIONTREE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


def jsonl(path: Path, *records: object) -> str:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path) -> list[str]:
    english = [{"text": f"the number {n} follows the number {n - 1} and so on"} for n in range(40)]
    return [
        jsonl(tmp_path / "en.jsonl", *english),
        jsonl(tmp_path / "zh.jsonl", *[{"text": "学而时习之，不亦说乎？" * n} for n in range(1, 9)]),
    ]


@pytest.fixture
def run(capsys):
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def config(tmp_path, files, run) -> str:
    assert run("data", "tokenizer", *files, "--vocab-size", 300, "--out", tmp_path / "bpe")[0] == 0
    path = tmp_path / "run.yaml"
    path.write_text(
        f"data:\n  train_paths: {json.dumps(files)}\n  tokenizer: {tmp_path / 'bpe'}\n"
        "training:\n  max_seq_length: 96\nseed: 3\n"
    )
    return str(path)


def test_tokenizer_leaves_a_folder_that_transformers_loads(run, files, tmp_path):
    from transformers import AutoTokenizer

    code, out, err = run("data", "tokenizer", *files, "--vocab-size", 320, "--out", tmp_path / "bpe")
    assert (code, err) == (0, "")
    assert "48 documents read, no record skipped" in out
    assert "a tokenizer of 320 tokens is in" in out
    assert len(AutoTokenizer.from_pretrained(tmp_path / "bpe")) == 320


def test_tokenizer_says_when_it_came_out_smaller_and_what_it_skipped(run, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"body": "word word"}, "{", {"body": 3})
    code, out, _ = run("data", "tokenizer", path, "--vocab-size", 9999, "--out", tmp_path / "bpe", "--text-key", "body")
    assert code == 0
    assert "(of 9999 asked for" in out
    assert f"1 document read, 2 records skipped: 1 broken JSON, 1 not a string (broken JSON first at {path}:2" in out


def test_check_is_content_with_good_files(run, files):
    code, out, err = run("data", "check", *files)
    assert (code, err) == (0, "")
    assert "all 48 records can be used" in out


def test_check_lists_what_is_wrong_where(run, files, tmp_path):
    bad = jsonl(tmp_path / "bad.jsonl", {"text": "fine"}, "", "{oops", {"title": "[x]", "body": "y"}, {"text": " "})
    code, out, err = run("data", "check", files[0], bad)
    assert code == 2
    assert f"{bad}:3: Expecting property name" in out
    assert f"{bad}:4: no key 'text', keys seen: 'title', 'body'" in out
    assert f"{bad}:5: key 'text' holds white space alone" in out
    assert "blank lines, which hold no record: 1" in out
    assert err == "error: 3 of 44 records cannot be used\n"


def test_check_shows_names_with_brackets_as_they_are(run, files, tmp_path):
    odd = tmp_path / "d[" / "x].jsonl"
    odd.parent.mkdir()
    odd.write_text('{"text": "the fox"}\n')
    code, shown, _ = run("data", "check", odd)
    assert code == 0 and "d[/x].jsonl" in shown


def test_inspect_shows_sizes_lengths_scripts_and_a_row(run, config):
    code, out, err = run("data", "inspect", config)
    assert (code, err) == (0, "")
    assert "data.train_paths: 2 files" in out and "48 lines" in out
    assert "sample: 48 of 48 records" in out
    assert "tokens of a document: " in out
    assert "Latin" in out and "Han" in out
    assert "the first packed row: 96 tokens" in out
    assert "<|endoftext|>[2]" in out


def test_inspect_takes_overrides_and_the_config_as_an_option(run, config, files):
    code, out, _ = run("data", "inspect", "--config", config, f"data.train_paths=[{files[1]}]", "data.num_workers=1")
    assert code == 0
    assert "data.train_paths: 1 file, 0.001 MB, 8 lines" in out
    code, out, _ = run("data", "inspect", config, f"data.eval_paths=[{files[0]}]", "--split", "eval", "--records", 10)
    assert code == 0
    assert "sample: 10 of 40 records" in out


def test_bad_input_is_one_sentence_and_exit_code_2(run, config, files, tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "déjà"}\n'.encode("latin-1"))
    missing_key = jsonl(tmp_path / "key.jsonl", {"body": "a"})
    empty = jsonl(tmp_path / "empty.jsonl", {"text": ""}, {"text": "  "})
    plain = jsonl(tmp_path / "plain.jsonl", "Once upon a time.")
    out_dir = tmp_path / "out"
    for arguments, problem in [
        (["check", tmp_path / "none.jsonl"], "FILES: .*none.jsonl does not exist"),
        (["check", tmp_path / "*.parquet"], "FILES: no file matches"),
        (["check", tmp_path], "is a folder; name the files in it"),
        (["tokenizer", files[0], "--vocab-size", "100", "--out", out_dir], "at least 258"),
        (["tokenizer", latin, "--vocab-size", "300", "--out", out_dir], "1 not UTF-8 .*latin.jsonl:1"),
        (["tokenizer", missing_key, "--vocab-size", "300", "--out", out_dir], "keys seen: 'body'"),
        (["tokenizer", empty, "--vocab-size", "300", "--out", out_dir], "none of the 2 records .* 2 empty text"),
        (["tokenizer", files[0], "--vocab-size", "300"], "--out"),
        (["tokenizer", files[0], "--vocab-size", "300", "--out", tmp_path / "bpe"], "bpe holds a tokenizer already"),
        (
            ["tokenizer", plain, "--vocab-size", "300", "--out", out_dir],
            r'each line must be a JSON object such as {"text"',
        ),
        (["inspect"], "name one config file, got none"),
        (["inspect", tmp_path / "none.yaml"], "none.yaml does not exist"),
        (["inspect", config, "data.tokenizer=./nowhere"], "tokenizer folder ./nowhere does not exist"),
        (["inspect", config, "data.tokenizer=null"], "data.tokenizer is not set"),
        (["inspect", config, "data.tokeniser=x"], "did you mean data.tokenizer"),
        (["inspect", config, "--split", "eval"], "data.eval_paths is empty"),
        (["inspect", config, "--split", "test"], "split"),
    ]:
        code, _, err = run("data", *arguments)
        assert code == 2, arguments
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert re.search(problem, err), (problem, err)
    assert not out_dir.exists()


def test_shared_corpora_are_fine(run):
    folder = Path(__file__).resolve().parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data sets are not beside this checkout")
    code, out, _ = run("data", "check", folder / "wikitext2" / "valid.jsonl", folder / "zh" / "*.jsonl")
    assert code == 0
    assert "all 5171 records can be used" in out


def test_tokenise_leaves_tokens_that_train_and_inspect_read(run, config, files, tmp_path):
    tokens = tmp_path / "tokens"
    code, out, err = run("data", "tokenise", config, f"data.static_dir={tokens}", "--processes", 1)
    assert (code, err) == (0, "")
    assert out == f"train: 48 documents in 1 shard in {tokens}/train\n"
    assert run("data", "tokenise", config, f"data.static_dir={tokens}")[:2] == (0, out)
    static = ["data.data_mode=static", f"data.static_dir={tokens}"]
    code, lazy_rows, _ = run("data", "inspect", config)
    assert run("data", "inspect", config, *static)[:2] == (code, lazy_rows) and code == 0
    jsonl(Path(files[0]), {"text": "changed"})
    code, _, err = run("data", "inspect", config, *static)
    assert code == 2 and "are not those of this run: the files' contents" in err
    assert run("data", "tokenise", config)[2].startswith("error: data.static_dir is not set")
    assert "data.train_paths is empty" in run("data", "tokenise", config, "data.train_paths=[]", *static)[2]


def test_what_cannot_be_used_is_told_before_training(run, config, tmp_path, caplog):
    """Records are drawn in a random order, so a short run may not come to them by itself."""
    packed = tmp_path / "more.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps({"text": os.urandom(9000).hex()}).encode())[:-900])
    good = jsonl(tmp_path / "good.jsonl", *({"text": f"text {number} of many words"} for number in range(400)))
    tokens, paths = tmp_path / "tokens", f"data.train_paths=[{good},{packed}]"
    code, out, err = run("data", "tokenise", config, paths, f"data.static_dir={tokens}", "data.on_bad_record=error")
    assert code == 2 and "train: 400 documents in 1 shard" in out and f"skipped, damaged file: 1\n  {packed}:1: " in out
    assert err.startswith("error: 1 records cannot be used (data.on_bad_record: skip")
    shortest = ["training.max_steps=1", "training.batch_size=1", "training.save_interval=0", "logging.progress=none"]
    shortest += [f"output_dir={tmp_path / 'run'}", "training.mixed_precision=no", "model.hidden_size=32"]
    shortest += ["model.num_layers=1", "model.num_heads=4", "model.mamba_head_dim=8", "training.warmup_steps=0"]
    code, _, err = run("train", "--config", config, paths, "data.on_bad_record=error", *shortest)
    assert code == 2 and f"error: {packed}:1: damaged file, " in err and not (tmp_path / "run").exists()
    assert run("train", "--config", config, paths, *shortest)[0] == 0
    assert any(f"{packed}:1: damaged file, " in message for message in caplog.messages)


def test_inspect_shows_the_beginning_of_a_stream(run, config, files):
    code, out, err = run("data", "inspect", config, "data.data_mode=hf_streaming", "--records", 20)
    assert (code, err) == (0, "")
    assert "sample: 20 records" in out and "about" not in out and "the first packed row: 96 tokens" in out
