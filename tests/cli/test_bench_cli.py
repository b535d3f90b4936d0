"""`fusiontree bench`."""

from __future__ import annotations

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
    shown = capsys.readouterr().out
    assert "2 x 48 tokens" in shown and "GFLOP/s" in shown
    for op, backends in available_backends().items():
        rows = [line.split("│") for line in shown.splitlines() if line.startswith(f"│ {op} ")]
        assert {row[2].strip() for row in rows} == set(backends)
        trains = op not in ("cached_attention", "token_cross_entropy")
        for row in rows:
            usable, reason = backends[row[2].strip()]
            if usable:
                assert all(cell.strip().endswith(("ms", "x", "MB")) for cell in row[3:7])
                assert all((cell.strip() != "–") == trains for cell in row[7:11])
            else:
                assert all(cell.strip() == "–" for cell in row[3:11])
                assert f"not measured: {op} {row[2].strip()}: {reason}" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "model folder nowhere does not exist"),
        (["MODEL", "other"], "bench measures one model: name one of "),
        (["MODEL", "--config", "x.yaml"], "a trained MODEL has its own configuration: leave out --config"),
        (["MODEL", "model.num_layers=1"], "a trained MODEL has its own configuration"),
        (["--config", "missing.yaml"], "config file missing.yaml does not exist"),
        (["model.hiden_size=1"], "model: `hiden_size` is not a field"),
        (["MODEL", "--peers", "gpt"], "there is no peer 'gpt'; there are llama, falcon_h1, mamba2, bamba"),
        (["MODEL", "--rounds", "0"], "Invalid value for '--rounds': Input should be greater than or equal to 1"),
        (
            ["MODEL", "--dtype", "int8"],
            "Invalid value for '--dtype': Value error, 'int8' is not one of 'bfloat16', 'float32'",
        ),
        (["ops", "--dtype", "int8"], "Invalid value for '--dtype': Value error, 'int8' is not one of"),
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
