"""`fusiontree bench`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fusiontree.cli import main
from fusiontree.eval.eval_system import BenchReport
from fusiontree.ops.backends import available_backends
from tiny_models import save_tiny_model

QUICK = ["--context", "16", "--new-tokens", "4", "--train-length", "16", "--train-batch", "2", "--rounds", "1"]
FLOAT = ["--dtype", "float32", "--device", "cpu"]
SMALL = ["model.hidden_size=64", "model.num_layers=1", "model.num_heads=4", "model.vocab_size=320"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", None)


def test_a_trained_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(folder), *QUICK, *FLOAT]) == 0
    shown = capsys.readouterr().out
    report = BenchReport.load(folder / "bench.json")
    assert [model.name for model in report.models] == [str(folder)]
    assert report.settings["context"] == 16 and report.settings["rounds"] == 1
    assert f"{report.models[0].parameters:,}" in shown
    assert "training 16 x 2, tokens/s" in shown
    assert str(folder / "bench.json") in shown


def test_lengths_and_batches_each_with_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*QUICK, *FLOAT, "--train-batch", "0", "--context", "16,140", "--batch", "1, 3"]
    assert main(["bench", str(folder), *options]) == 0
    shown = capsys.readouterr().out
    report = BenchReport.load(folder / "bench.json")
    (model,) = report.models
    assert (report.settings["context"], report.settings["batch"]) == (16, 1)
    assert [(one.context, one.batch) for one in model.more] == [(16, 3), (140, 1), (140, 3)]
    states = [model.state_bytes, *(one.state_bytes for one in model.more)]
    # Of one sequence each: a state of more tokens is larger, one beside others is not, but for the counts they share.
    assert states[2] > states[0] and abs(states[1] - states[0]) < 64 and abs(states[3] - states[2]) < 64
    for one in model.more:
        assert one.prefill_tokens_per_second == pytest.approx(one.context * one.batch / one.rounds["prefill"][0])
        assert one.decode_tokens_per_second == pytest.approx(one.rounds["decode"][0])
        row = next(line for line in shown.splitlines() if re.search(rf"{one.context} +│ +{one.batch} ", line))
        assert f"{one.decode_tokens_per_second:,.1f}" in row and f"{one.state_bytes / 1e3:,.0f}" in row


def test_a_configuration_beside_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text("model: {hidden_size: 96, num_heads: 4, num_layers: 9}\n")
    options = ["--config", str(config), "--peers", "llama, llama", *QUICK, *FLOAT]
    assert main(["bench", *options, *SMALL, "model.mamba_head_dim=16"]) == 0
    report = BenchReport.load(tmp_path / "bench.json")
    assert [model.name for model in report.models] == [str(config), "llama"]
    ours, llama = (model.parameters for model in report.models)
    assert abs(llama / ours - 1) <= 0.03
    assert "x)" in capsys.readouterr().out


def test_the_quickstarts_model_without_any_name(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    assert main(["bench", *QUICK, *FLOAT, "--train-batch", "0", "--out", str(out), *SMALL]) == 0
    report = BenchReport.load(out)
    assert report.models[0].name == "quickstart"
    assert report.models[0].train_tokens_per_second is None


def test_ops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "ops", "--context", "48", "--batch", "2", *FLOAT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 x 48 tokens" in lines[0] and any("GFLOP/s" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)
    for op, backends in available_backends().items():
        rows = lines[lines.index(op) + 1 :]
        for name, (usable, reason) in backends.items():
            cells = next(row for row in rows if row.startswith(f"  {name} ")).split()[1:]
            if not usable:
                assert " ".join(cells).startswith(f"not usable: {reason}"[:40])
            elif name in ("torch", "reference"):
                trains = op not in ("cached_attention", "token_cross_entropy")
                assert len(cells) == (8 if trains else 4)
                assert all(float(cell.removesuffix("x")) >= 0 for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["MODEL", "--context", "16,x"],
            "--context must be a whole number from 1 to 2147483647, or several",
        ),
        (
            ["MODEL", "--context", "1_6"],
            "--context must be a whole number from 1 to 2147483647, or several",
        ),
        (["MODEL", "--context", "99999999999"], "--context must be a whole number from 1 to 2147483647, or several"),
        (["MODEL", "--batch", "0"], "--batch must be a whole number from 1 to 2147483647, or several"),
        (["ops", "--batch", "1,2"], "bench ops takes one --context and one --batch"),
        (["LEARNED", "--context", "16,200"], "263 positions are needed, but the model's learned time encoding"),
        (["nowhere"], "model folder nowhere does not exist"),
        (["opps"], "there is no model folder opps; did you mean ops?"),
        (["MODEL", "other"], "bench measures one model: name one of "),
        (["MODEL", "--config", "x.yaml"], "a trained MODEL has its own configuration: leave out --config"),
        (["MODEL", "model.num_layers=1"], "a trained MODEL has its own configuration"),
        (["--config", "missing.yaml"], "config file missing.yaml does not exist"),
        (["model.hiden_size=1"], "model: `hiden_size` is not a field"),
        (["MODEL", "--peers", "gpt"], "there is no peer 'gpt'; there are llama, falcon_h1, mamba2, bamba"),
        (["MODEL", "--rounds", "0"], "Invalid value for '--rounds': Input should be greater than or equal to 1"),
        (
            ["MODEL", "--dtype", "int8"],
            "Invalid value for '--dtype': 'int8' is not one of 'bfloat16', 'float32'",
        ),
        (["ops", "--dtype", "int8"], "Invalid value for '--dtype': 'int8' is not one of"),
        (
            ["ops", "--out", "x.json", "model.num_layers=1"],
            "bench ops takes --context, --batch, --dtype and --device alone: leave out --train-batch, --out, model.",
        ),
        (["MODEL", "--device", "abacus"], "device 'abacus' cannot be used here: name cpu or cuda"),
        (["MODEL", "--out", "FILE/bench.json"], "--out: the directory "),
        (["LEARNED", "--context", "200"], "263 positions are needed, but the model's learned time encoding (SRTE)"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, tmp_path: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    names = {
        "MODEL": str(folder),
        "LEARNED": str(tmp_path / "learned"),
        "FILE/bench.json": str(tmp_path / "file" / "bench.json"),
    }
    save_tiny_model(tmp_path / "learned", None, srte_encoding="learned")
    capsys.readouterr()
    given = ["bench", *(names.get(word, word) for word in arguments)]
    assert main([*given, "--train-batch", "0"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {sentence}")
    assert shown.count("\n") == 1
