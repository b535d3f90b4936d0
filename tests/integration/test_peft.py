"""LoRA with `peft` on a trained model, and transformers' pipeline: what users bring along works as on any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import pipeline

from fusiontree import HybridLanguageModel, load, train
from fusiontree.artifacts import LayerDecision, PrunePlan
from fusiontree.deploy import export
from fusiontree.deploy.runtime import InferenceRuntime
from tiny_models import save_tiny_model

TEXT = "seven silver birds sing about glass rivers and cities"
# Every linear layer of any model, as the documentation lists them; and the head.
LINEAR = ["in_proj", "out_proj", "qkv_proj", "up", "down", "fusion_proj", "proj", "x_proj", "dt_proj", "align_proj"]
TARGETS = [*LINEAR, "lm_head"]
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "mamba 1": {"mamba_version": 1},
    "tied": {"tie_word_embeddings": True},
    "learned times": {"srte_encoding": "learned"},
    "merged export": {},
    "merged export, aligned": {"mlp": "aligned"},
}


@pytest.fixture(scope="module")
def run(run_settings: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "trained"
    train(run_settings(output_dir=str(folder), training={"max_steps": 40}))
    return folder


@pytest.fixture
def model(run: Path) -> HybridLanguageModel:
    return load(run, device="cpu")


def adapt(model: HybridLanguageModel, targets: str | list[str] = TARGETS, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=targets, **fields)
    return get_peft_model(model, config)


def test_adapters_learn_are_saved_and_merged(model: HybridLanguageModel, run: Path, tmp_path: Path) -> None:
    tokenizer = model.tokenizer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = adapt(model).train()
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(30):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 1:  # the second matrices start at zero, so the first ones' gradients do in the first step
            found = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
            assert len(found) == 2 * (2 + 11 * model.config.num_layers)  # time encoding and head
            for name, gradient in found.items():
                assert gradient is not None and gradient.abs().max() > 0, f"{name} is bypassed"
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    base = adapted.get_base_model()
    for name, value in before.items():
        kept = base.state_dict().get(name, base.state_dict().get(name.replace(".weight", ".base_layer.weight")))
        if kept is None:
            kept = base.state_dict()[name.replace(".bias", ".base_layer.bias")]
        assert torch.equal(kept, value), name

    adapted.eval()
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        adapted.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(run, device="cpu"), tmp_path / "adapter").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=0, atol=1e-5)
        unmerged = InferenceRuntime(adapted.get_base_model(), tokenizer).generate(TEXT[:12], max_new_tokens=8)
        merged = again.merge_and_unload()
        assert isinstance(merged, HybridLanguageModel)
        torch.testing.assert_close(merged(input_ids=ids).logits, wanted, rtol=0, atol=1e-4)
        assert InferenceRuntime(merged, tokenizer).generate(TEXT[:12], max_new_tokens=8) == unmerged
        assert InferenceRuntime(load(run, device="cpu")).generate(TEXT[:12], max_new_tokens=8) != unmerged
        merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load(tmp_path / "merged", device="cpu")(ids).logits, merged(ids).logits, rtol=0, atol=0)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> HybridLanguageModel:
    model = load(save_tiny_model(tmp_path / "whole", None, **VARIANTS[request.param]), device="cpu")
    if not request.param.startswith("merged export"):
        return model
    zeros, halves = [0.0] * model.config.hidden_size, [0.5] * model.config.hidden_size
    layers = [LayerDecision(keep=keep, reason="", constant=zeros, gate=halves) for keep in ("attention", "mamba")]
    plan = PrunePlan(criterion="test", thresholds={}, source="test", layers=layers)
    model = export(model, plan, tmp_path / "cut", merge=True)
    assert model.config.layer_merges == ["hz", "z" if model.config.mlp == "aligned" else "hz"]
    return model


@pytest.mark.parametrize("targets", ["all-linear", "list"])
def test_adapters_of_every_model_train_and_merge(variant: HybridLanguageModel, targets: str) -> None:
    """Of each linear layer; the head's only by name, and where the embeddings are not its weight too."""
    takes_head = targets == "list" and not variant.config.tie_word_embeddings
    linear = {name for name, part in variant.named_modules() if isinstance(part, torch.nn.Linear)}
    expected = linear if takes_head else linear - {"lm_head"}
    plain = variant(torch.arange(3, 43)[None]).logits
    adapted = adapt(
        variant, targets if targets == "all-linear" else TARGETS if takes_head else LINEAR, init_lora_weights=False
    )
    ids = torch.arange(3, 43)[None]
    adapted(input_ids=ids, labels=ids).loss.backward()
    found = set()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{name} is bypassed"
            found.add(name.removeprefix("base_model.model.").partition(".lora_")[0])
    assert found == expected
    adapted.eval()
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        assert (wanted - plain).abs().max() > 0.1
        got = adapted.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * max(1.0, float(wanted.abs().max())))


def test_the_loss_of_an_adapted_head_is_that_of_its_logits(model: HybridLanguageModel) -> None:
    ids = torch.tensor([model.tokenizer(TEXT)["input_ids"]] * 2)
    labels = ids.clone()
    labels[0, 5:] = -100
    plain = model(ids, labels=labels).loss
    adapted = adapt(model, init_lora_weights=False)
    output = adapted(input_ids=ids, labels=labels, logits_to_keep=ids.shape[1])
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(output.loss.item() - plain.item()) > 1e-3
    assert adapted(input_ids=ids, labels=torch.full_like(ids, -100)).loss.item() == 0


def test_the_pipeline_of_transformers_generates(model: HybridLanguageModel) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    (found,) = generator("the quick", max_new_tokens=8, do_sample=False, return_full_text=False)
    ids = torch.tensor([model.tokenizer("the quick")["input_ids"]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert found["generated_text"] == model.tokenizer.decode(expected, skip_special_tokens=True)
    rows = generator(["the quick", "a"], max_new_tokens=8, do_sample=False, return_full_text=False, batch_size=2)
    assert rows[0][0]["generated_text"] == found["generated_text"]
