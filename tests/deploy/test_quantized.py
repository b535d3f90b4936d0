"""Weights in 8 and 4 bits: what is rounded and what is not, and that the model computes with the rounded weights."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from fusiontree import HybridCache, HybridLanguageModel, InputError, load
from fusiontree.artifacts import BenchReport, EvalReport, LayerDecision, PrunePlan, RunManifest
from fusiontree.cli import main
from fusiontree.deploy.quantized import quantize_weights, weight_bytes
from fusiontree.deploy.runtime import InferenceRuntime, SchedulerSettings
from fusiontree.eval.eval_llm import evaluate_perplexity
from fusiontree.eval.texts import Texts
from tiny_models import save_tiny_model

WIDE = {"hidden_size": 96, "gate_rank": 32, "srte_rank": 8}  # most layers fit groups of 32


@pytest.fixture(scope="module")
def wide_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("wide"), corpus / "tokenizer", **WIDE)


def linear_layers(model: HybridLanguageModel) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in model.layers.named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture(scope="module", params=["int8", "int4"])
def pair(request: pytest.FixtureRequest, wide_folder: Path) -> tuple[HybridLanguageModel, HybridLanguageModel, str]:
    """A model as it was, and rounded."""
    plain = load(wide_folder, device="cpu")
    rounded = copy.deepcopy(plain)
    done = quantize_weights(rounded, request.param)
    assert done.layers[request.param] >= 20 and sum(done.layers.values()) == len(linear_layers(plain))
    assert done.bytes_before == weight_bytes(plain) == sum(p.numel() * p.element_size() for p in plain.parameters())
    in_layers = sum(layer.weight.numel() for layer in linear_layers(plain).values())
    left = done.bytes_after - (done.bytes_before - 4 * in_layers)
    # A byte or half of one a weight; besides, scales and offsets in float32.
    assert left < (1.4 if request.param == "int8" else 1.1) * in_layers
    return plain, rounded, request.param


def test_only_linear_layers_of_blocks_are_rounded(
    pair: tuple[HybridLanguageModel, HybridLanguageModel, str],
) -> None:
    plain, rounded, _ = pair
    changed = {f"layers.{name}.weight" for name in linear_layers(plain)}
    after = dict(rounded.named_parameters())
    for name, before in plain.named_parameters():
        if name not in changed:
            assert after[name].dtype == before.dtype and torch.equal(after[name], before), name
    assert rounded.layers[0].mamba.A_log.dtype == torch.float32


@torch.no_grad()
def test_it_computes_with_the_rounded_weights(pair: tuple[HybridLanguageModel, HybridLanguageModel, str]) -> None:
    plain, rounded, kind = pair
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(plain)
    for name, layer in linear_layers(reference).items():
        own = linear_layers(rounded)[name]
        product = own(torch.eye(own.in_features))
        weight = (product if own.bias is None else product - own.bias).T
        # Each row's weights moved by less than one step between 256 or 16 values.
        span = layer.weight.amax(1) - layer.weight.amin(1)
        assert ((weight - layer.weight).abs().amax(1) <= span / (100 if kind == "int8" else 10)).all(), name
        layer.weight.copy_(weight)
    logits = rounded(ids).logits
    torch.testing.assert_close(logits, reference(ids).logits, rtol=0, atol=2e-3)
    assert (logits - plain(ids).logits).abs().max() > 1e-3
    cache = HybridCache(rounded.config)
    steps = [rounded(piece, past_key_values=cache).logits for piece in ids.split((7, 1, 20, 12), dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), logits, rtol=0, atol=2e-3)


def test_a_conversation_is_saved_and_taken_up(
    pair: tuple[HybridLanguageModel, HybridLanguageModel, str], tmp_path: Path
) -> None:
    plain, rounded, _ = pair
    runtime = InferenceRuntime(rounded, settings=SchedulerSettings(prefix_bytes=2**22))
    (text,) = runtime.generate("the quick brown fox", max_new_tokens=8)
    ids = runtime.encode("the quick brown fox")
    runtime.save_conversation(tmp_path / "state", ids, "kept")
    again = InferenceRuntime(rounded, settings=SchedulerSettings(prefix_bytes=2**22))
    assert again.load_conversation(tmp_path / "state") == "kept"
    assert again.generate("the quick brown fox", max_new_tokens=8) == [text]
    with pytest.raises(InputError):
        InferenceRuntime(plain, settings=SchedulerSettings(prefix_bytes=2**22)).load_conversation(tmp_path / "state")


def test_the_command_line_rounds_and_says_so(wide_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(wide_folder, device="cpu")
    done = quantize_weights(model, "int8")
    (expected,) = InferenceRuntime(model).generate("the quick", max_new_tokens=8)
    capsys.readouterr()
    options = ["generate", str(wide_folder), "--prompt", "the quick", "--greedy", "-n", "8", "--device", "cpu"]
    assert main([*options, "--weights", "int8"]) == 0
    assert capsys.readouterr() == (expected + "\n", f"{done}\n")
    assert f"weights: {done.bytes_before:,} -> {done.bytes_after:,} bytes" in str(done)
    assert main([*options, "--weights", "int3"]) == 2
    assert capsys.readouterr().err == "error: weights can be int8 or int4, got 'int3'\n"
    assert main([*options, "--weights", "int8", "--compile"]) == 2
    assert capsys.readouterr().err == "error: --weights does not go with --compile: choose one of the two\n"


def test_what_cannot_be_rounded(wide_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(wide_folder, device="cpu").config
    with torch.device("meta"):
        nowhere = HybridLanguageModel(config)
    with pytest.raises(InputError, match="weights in int8 are for cpu and cuda, the model is on meta"):
        quantize_weights(nowhere, "int8")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))
    with pytest.raises(InputError, match=r"weights in int4 need torchao: pip install 'fusiontree\[quant\]'"):
        quantize_weights(load(wide_folder, device="cpu"), "int4")


def test_rounded_models_are_evaluated_and_benched(
    wide_folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = str(corpus / "eval.jsonl")
    evaluate = ["eval", str(wide_folder), "--data", text, "--device", "cpu", "--out", str(tmp_path)]
    assert main(evaluate) == 0
    plain = EvalReport.load(tmp_path / "eval_report.json")
    capsys.readouterr()
    recall = ["--tasks", "mqar", "--lengths", "32", "--pairs", "2", "--rows", "1"]
    assert main([*evaluate, "--weights", "int8", *recall]) == 0
    shown, rounded = capsys.readouterr(), EvalReport.load(tmp_path / "eval_report.json")
    assert "kept from" not in shown.err and "in int8" in shown.err and "weights in int8" in shown.out
    assert (plain.settings["weights"], rounded.settings["weights"]) == (None, "int8")
    # Computed by hand with the same rounding.
    model = load(wide_folder, device="cpu")
    quantize_weights(model, "int8")
    by_hand = evaluate_perplexity(model, Texts([text]), name="by hand")
    assert rounded.loss == by_hand.loss != plain.loss and rounded.mqar is not None
    size = ["--context", "8", "--new-tokens", "2", "--train-batch", "1", "--train-length", "8", "--rounds", "1"]
    out = ["--out", str(tmp_path / "bench.json"), "--device", "cpu", "--dtype", "float32"]
    assert main(["bench", str(wide_folder), *size, *out, "--weights", "int8", "--peers", "llama"]) == 0
    report = BenchReport.load(tmp_path / "bench.json")
    shown = " ".join(capsys.readouterr().out.split())
    assert report.settings["weights"] == "int8" and "weights, int8, computing in float32, MB" in shown
    assert "whose weights alone are rounded" in shown
    assert report.models[0].parameter_bytes == weight_bytes(model)
    assert report.models[1].parameter_bytes == 4 * report.models[1].parameters  # those beside it are left whole
    assert report.models[0].train_tokens_per_second is not None
    assert main([*evaluate, "--weights", "int8", "--mixed-precision", "bf16"]) == 2
    assert "--weights does not go with --mixed-precision bf16" in capsys.readouterr().err
    for command in (evaluate, ["bench", str(wide_folder), *size, *out]):
        assert main([*command, "--weights", "int3"]) == 2
        assert capsys.readouterr().err == "error: weights can be int8 or int4, got 'int3'\n"


def test_an_export_is_measured_rounded_and_written_whole(
    wide_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, out, page = tmp_path / "plan.json", tmp_path / "cut", tmp_path / "page.html"
    layers = [LayerDecision(keep="mamba", reason="by hand"), LayerDecision(keep="both", reason="by hand")]
    PrunePlan(criterion="by hand", thresholds={}, source="test", layers=layers).save(plan)
    export = ["export", str(wide_folder), str(plan), str(out), "--context", "32", "--device", "cpu"]
    assert main([*export, "--weights", "int3"]) == 2
    assert "weights can be int8 or int4, got 'int3'" in capsys.readouterr().err and not out.exists()
    assert main([*export, "--weights", "int8"]) == 0
    whole, rounded = load(out, device="cpu"), load(out, device="cpu")
    done = quantize_weights(rounded, "int8")
    sizes = [weight_bytes(model) for model in (load(wide_folder, device="cpu"), whole, rounded)]
    a, b, c = (f"{size / 1e6:,.2f}" for size in sizes)
    card = (out / "README.md").read_text()
    assert f"| weights, MB | {a} | {b} | {sizes[1] / sizes[0]:.2f} | {c} | {sizes[2] / sizes[0]:.2f} |" in card
    assert f"rounds them when this folder is loaded ({done}), its logits move by at most" in card
    assert main(["report", str(wide_folder), str(out), "-o", str(page)]) == 0
    costs = RunManifest.load(out / "manifest.json").config["costs"]
    memory = {name: costs[name]["weight_bytes"] + costs[name]["state_bytes"] for name in ("parent", "int8")}
    cell = f"{memory['int8'] / 1e6:,.2f} ({memory['int8'] / memory['parent']:.2f}x)"
    assert cell in page.read_text(encoding="utf-8") and "in int8: both, MB" in page.read_text(encoding="utf-8")
