"""Supervised fine-tuning with `trl`: a toy set is learned, and its loss is ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from fusiontree import HybridLanguageModel, load
from tiny_models import save_tiny_model

PAIRS = [("who sings?", " seven silver birds"), ("where?", " about rivers and cities of glass"), ("how?", " lazy")]


def trainer(model: HybridLanguageModel, folder: Path, **options: Any) -> SFTTrainer:
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    config = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **options,
    )
    return SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=model.tokenizer)


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


def test_the_body_is_called_without_the_head(model: HybridLanguageModel) -> None:
    """As libraries do that bring a loss of their own."""
    ids = torch.tensor([model.tokenizer("who sings?")["input_ids"]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.lm_head(hidden), model(ids).logits, rtol=0, atol=0)
    assert model.get_decoder()(input_ids=ids).last_hidden_state.shape == hidden.shape
    assert model.get_encoder() is model and model.base_model.get_input_embeddings() is model.embed_tokens
    assert copy.deepcopy(model).base_model is not model.base_model
