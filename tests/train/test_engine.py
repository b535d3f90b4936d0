"""The training step against the same thing written out by hand, and however a batch is cut into micro-batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fusiontree
from fusiontree.data import build_loader, load_tokenizer
from fusiontree.models.layout import shift_labels
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings

STEPS = 4


def lm_rows(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "lm_loss" in row]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(fusiontree.load(run, device="cpu").named_parameters())


def test_however_a_batch_is_cut(run_settings, tmp_path: Path) -> None:
    runs = []
    for rows, pieces in ((4, 1), (2, 2), (1, 4)):
        training = {"batch_size": rows, "gradient_accumulation_steps": pieces, "max_steps": STEPS, "eval_interval": 0}
        run = tmp_path / f"{rows}x{pieces}"
        fusiontree.train(run_settings(training=training, loss={"gate_margin": 0.0}, output_dir=str(run)))
        runs.append(run)
    for other in runs[1:]:
        for row, expected in zip(lm_rows(other), lm_rows(runs[0]), strict=True):
            for name in ("loss", "lm_loss", "load_balance_loss", "entropy_loss", "grad_norm", "gate_mean"):
                assert row[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        wanted = weights(runs[0])
        for name, value in weights(other).items():
            torch.testing.assert_close(value, wanted[name], atol=2e-6, rtol=1e-4, msg=name)


def test_a_run_is_adamw_clipping_and_the_schedule(run_settings, tmp_path: Path) -> None:
    training = {
        "max_steps": STEPS,
        "warmup_steps": 2,
        "learning_rate": 1e-2,
        "min_lr_ratio": 0.2,
        "grad_clip": 0.5,
        "weight_decay": 0.3,
        "betas": [0.8, 0.9],
        "eval_interval": 0,
    }
    loss = {"gate_target": 0.4, "gate_margin": 0.0, "load_balance_coeff": 0.3, "entropy_reg_coeff": 0.02}
    sections = run_settings(training=training, loss=loss, output_dir=str(tmp_path / "run"))
    settings = RunSettings.parse(sections)
    engine = TrainingEngine(settings)
    start = {name: value.detach().clone() for name, value in engine.parallel.module.named_parameters()}
    engine.run()

    model = engine.parallel.module
    trained = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(start[name])
    decayed, spared = [], []
    for name, value in model.named_parameters():
        is_matrix = value.dim() >= 2 and "embed" not in name and not name.endswith(("A_log", "D", "dt_bias"))
        (decayed if is_matrix else spared).append(value)
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.8, 0.9), eps=settings.training.eps)
    loader = build_loader(
        settings.data,
        load_tokenizer(settings.data.tokenizer),
        batch_size=4,  # the two micro-batches of two rows at once
        max_seq_length=settings.training.max_seq_length,
        seed=settings.seed,
    )
    model.train()
    for step, batch in zip(range(1, STEPS + 1), loader, strict=False):
        out = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        targets = shift_labels(batch.labels, batch.position_ids).flatten()
        total = F.cross_entropy(out.logits.flatten(0, 1), targets)
        stats = out.gate_stats
        total = total + 0.3 * (stats.mean - 0.4).abs().mean() - 0.02 * stats.entropy.mean()
        model.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        rate = 1e-2 * (step / 2 if step <= 2 else 0.2 + 0.8 * (1 + math.cos(math.pi * (step - 2) / 2)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        row = lm_rows(tmp_path / "run")[step - 1]
        assert row["loss"] == pytest.approx(total.item(), abs=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3) and norm > 0.5
        assert row["lr"] == pytest.approx(rate)
    for name, value in model.named_parameters():
        # AdamW divides by the gradient's own size: where that is next to nothing, rounding decides the step's sign.
        assert (value - trained[name]).abs().mean() <= 2e-4, name
