"""Supervised fine-tuning with `trl`: a toy set is learned, and its loss is ours."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from fusiontree import HybridLanguageModel, load
from fusiontree.errors import InputError
from tiny_models import save_tiny_model

PAIRS = [("who sings?", " seven silver birds"), ("where?", " about rivers and cities of glass"), ("how?", " lazy")]


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def trainer(
    model: HybridLanguageModel | PeftModel, folder: Path, peft_config: LoraConfig | None = None, **options: Any
) -> SFTTrainer:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    config = SFTConfig(**settings(folder), **options)
    data = Dataset.from_list(rows)
    return SFTTrainer(model, args=config, train_dataset=data, processing_class=model.tokenizer, peft_config=peft_config)


def first_loss(fitted: SFTTrainer) -> float:
    fitted.train()
    return next(row["loss"] for row in fitted.state.log_history if "loss" in row)


@pytest.fixture
def model(corpus: Path, tmp_path: Path) -> HybridLanguageModel:
    return load(save_tiny_model(tmp_path / "model", corpus / "tokenizer"), device="cpu")


def test_a_toy_set_is_learned(model: HybridLanguageModel, tmp_path: Path) -> None:
    tokenizer = model.tokenizer
    encoded = [(tokenizer(prompt)["input_ids"], tokenizer(rest)["input_ids"]) for prompt, rest in PAIRS]
    losses, tokens = 0.0, 0
    for prompt, rest in encoded:
        rest = [*rest, tokenizer.eos_token_id]
        ids, labels = torch.tensor([prompt + rest]), torch.tensor([[-100] * len(prompt) + rest])
        with torch.no_grad():
            losses += model(ids, labels=labels).loss.item() * len(rest)
        tokens += len(rest)
    fitted = trainer(model, tmp_path / "run", max_steps=40)
    fitted.train()
    logged = [row["loss"] for row in fitted.state.log_history if "loss" in row]
    # The first step's loss is that of the untouched model: completions alone count, rows are padded, each ends.
    assert logged[0] == pytest.approx(losses / tokens, rel=1e-3)
    assert logged[-1] < 0.2 * logged[0]
    model.eval()
    prompt, rest = encoded[0]
    new = model.generate(torch.tensor([prompt]), max_new_tokens=len(rest) + 1, do_sample=False)[0, len(prompt) :]
    assert new.tolist() == [*rest, tokenizer.eos_token_id]


def test_packed_rows_have_the_loss_of_the_texts_alone(model: HybridLanguageModel, tmp_path: Path) -> None:
    alone = first_loss(trainer(copy.deepcopy(model), tmp_path / "alone", max_steps=1))
    packed = trainer(model, tmp_path / "packed", packing=True, max_length=128, max_steps=1)
    assert len(packed.train_dataset) == 1
    assert first_loss(packed) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_adapters_are_trained(model: HybridLanguageModel, is_wrapped: bool, tmp_path: Path) -> None:
    plain = first_loss(trainer(copy.deepcopy(model), tmp_path / "plain", max_steps=1))
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    adapted: HybridLanguageModel | PeftModel = get_peft_model(model, lora) if is_wrapped else model
    fitted = trainer(adapted, tmp_path / "lora", None if is_wrapped else lora, max_steps=30)
    assert first_loss(fitted) == pytest.approx(plain, rel=1e-5)  # adapters begin as zero
    losses = [row["loss"] for row in fitted.state.log_history if "loss" in row]
    assert losses[-1] < 0.9 * losses[0]


def test_preferences_are_trained_against_a_copy_of_the_model(model: HybridLanguageModel, tmp_path: Path) -> None:
    rows = [{"prompt": prompt, "chosen": rest, "rejected": " cities"} for prompt, rest in PAIRS]
    config = DPOConfig(**settings(tmp_path / "run"), max_steps=15)
    fitted = DPOTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=model.tokenizer)
    fitted.train()
    losses = [row["loss"] for row in fitted.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), rel=1e-4)  # the model and its reference are one at first
    assert losses[-1] < 0.8 * losses[0]


def test_documents_are_marked_by_positions_alone(model: HybridLanguageModel) -> None:
    ids = torch.tensor([model.tokenizer("who sings?")["input_ids"]])
    ends = torch.tensor([0, 2, ids.shape[1]], dtype=torch.int32)
    positions = torch.tensor([[0, 1, *range(ids.shape[1] - 2)]])
    for call in (model, model.base_model):
        with torch.no_grad():
            marked = call(input_ids=ids, position_ids=positions, cu_seq_lens_q=ends, use_cache=False)
            plain = call(input_ids=ids, position_ids=positions, use_cache=False)
        for name in ("logits", "last_hidden_state"):
            if hasattr(marked, name) and getattr(plain, name) is not None:
                torch.testing.assert_close(getattr(marked, name), getattr(plain, name), rtol=0, atol=0)
        with pytest.raises(InputError, match="give `position_ids`, which are 0 where a document starts"):
            call(input_ids=ids, cu_seq_lens_q=ends)
        with pytest.raises(InputError, match="`output_attentions` cannot be had"):
            call(input_ids=ids, output_attentions=True)
        with pytest.raises(TypeError, match="cu_seq_lens"):
            call(input_ids=ids, cu_seq_lens=ends)
        assert isinstance(call(input_ids=ids, return_dict=False), tuple)


def test_the_body_is_called_without_the_head(model: HybridLanguageModel) -> None:
    """As libraries do that bring a loss of their own."""
    ids = torch.tensor([model.tokenizer("who sings?")["input_ids"]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), model(ids).logits, rtol=0, atol=0)
    assert model.get_decoder()(input_ids=ids).last_hidden_state.shape == hidden.shape
    assert model.get_encoder() is model and model.base_model.get_input_embeddings() is model.embed_tokens
    assert copy.deepcopy(model).base_model is not model.base_model
