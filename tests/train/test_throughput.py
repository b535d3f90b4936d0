"""The operations that a run counts, beside torch's own count of those that ran; peaks and memory in the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fusiontree
from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.data.batch import Batch
from fusiontree.ops import selective_scan, ssd_scan
from fusiontree.train.setup import enable_gradient_checkpointing
from fusiontree.train.throughput import FlopCount, peak_memory_bytes

aten = torch.ops.aten
SIZES = {"vocab_size": 320, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "global_heads": 1, "window_size": 64}
SIZES |= {"mamba_head_dim": 16, "mamba_state_size": 16, "gate_rank": 8, "srte_rank": 8}
ROWS, LENGTH = 2, 64


def attention_flops(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    """Scores and values of every query with every key, [B,h,T,D] each; torch's counter does not know this kernel."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def added_product_flops(total: Any, a: Any, b: Any, **options: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


UNKNOWN_TO_TORCH = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten.addmm_: added_product_flops,
}


def batch_of(documents: int) -> Batch:
    ids = torch.randint(SIZES["vocab_size"], (ROWS, LENGTH))
    positions = torch.arange(LENGTH // documents).repeat(documents).expand(ROWS, -1)
    return Batch(input_ids=ids, labels=ids, position_ids=positions)


def counted(model: HybridLanguageModel, batch: Batch) -> dict[str, int]:
    """Operations by kind in a forward and a backward pass."""
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        model(batch.input_ids, position_ids=batch.position_ids, labels=batch.labels).loss.backward()
    found: dict[str, int] = {}
    for kernel, operations in counter.get_flop_counts()["Global"].items():
        name = str(kernel)
        kind = "attention" if "dot_product" in name else "scan" if "bmm" in name else "linear" if "mm" in name else name
        found[kind] = found.get(kind, 0) + operations
    return found


def model_of(**fields: Any) -> HybridLanguageModel:
    torch.manual_seed(0)
    return HybridLanguageModel(HybridLanguageModelConfig(**(SIZES | fields))).train()


def linear_part(model: HybridLanguageModel, batch: Batch) -> float:
    """What is counted once the attention and the scans are taken away."""
    count = FlopCount(model)
    count._per_pair.clear()
    scans = sum(layer.mamba is not None for layer in model.layers)
    states = scans * model.config.mamba_inner_size * model.config.mamba_state_size
    return count([batch]) - 12 * states * batch.input_ids.numel()


@pytest.mark.parametrize("documents", [1, 4])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"mamba_version": 1},
        {"num_kv_heads": 2, "global_heads": 2, "mamba_expand": 2},
        {"layer_branches": ["mamba", "attention"]},
        {"tie_word_embeddings": True, "use_alignment": False},
        {"mlp": "aligned"},
    ],
    ids=["default", "mamba1", "grouped", "pruned", "tied", "aligned"],
)
def test_linear_maps_are_counted_as_torch_counts_them(fields: dict[str, Any], documents: int) -> None:
    model, batch = model_of(**fields), batch_of(documents)
    # The time encoding's input has no gradient, so its backward pass is one product instead of two.
    spared = 2 * model.config.srte_rank * model.config.hidden_size * batch.input_ids.numel()
    assert linear_part(model, batch) - spared == counted(model, batch)["linear"]


def test_what_is_computed_again_counts_once() -> None:
    model, batch = model_of(), batch_of(2)
    once = FlopCount(model)([batch])
    plain = counted(model, batch)
    enable_gradient_checkpointing(model, "block")
    again = counted(model, batch)
    assert again["linear"] > 1.2 * plain["linear"]
    assert FlopCount(model)([batch]) == once


def test_attention_counts_the_visible_pairs() -> None:
    """The kernel computes all pairs of a block: with one document of T tokens T x T, of which T (T + 1) / 2 count."""
    model, batch = model_of(), batch_of(1)
    attention = FlopCount(model)([batch]) - linear_part(model, batch) - scan_part(model, batch)
    # Torch counted the forward pass alone: backward, this kernel goes under another name.
    assert attention / 3 == pytest.approx(counted(model, batch)["attention"] * (LENGTH + 1) / (2 * LENGTH))


def test_windows_and_documents_hide_pairs() -> None:
    whole = model_of(global_heads=4, layer_branches=["attention"] * 2)
    windowed = model_of(global_heads=0, window_size=8, layer_branches=["attention"] * 2)
    one, four = batch_of(1), batch_of(4)
    pairs = {
        "whole": (FlopCount(whole)([one]) - linear_part(whole, one), LENGTH * (LENGTH + 1) // 2),
        "four documents": (FlopCount(whole)([four]) - linear_part(whole, four), 4 * (16 * 17 // 2)),
        "window": (FlopCount(windowed)([one]) - linear_part(windowed, one), 8 * 9 // 2 + (LENGTH - 8) * 8),
    }
    layers, heads, head_width = 2, 4, 16
    for name, (operations, expected) in pairs.items():
        assert operations == 3 * 4 * head_width * heads * layers * ROWS * expected, name


def scan_part(model: HybridLanguageModel, batch: Batch) -> int:
    states = model.config.num_layers * model.config.mamba_inner_size * model.config.mamba_state_size
    return 12 * states * batch.input_ids.numel()


def test_a_scan_counts_as_the_recurrence_reads_its_state() -> None:
    """Reading is the recurrence's matrix product, which torch counts; writing the state costs as much again."""
    batch, tokens, heads, width, state = 2, 20, 4, 8, 16
    x, dt, A = torch.randn(batch, tokens, heads, width), torch.rand(batch, tokens, heads), -torch.rand(heads)
    B, C = torch.randn(2, batch, tokens, 1, state)
    with FlopCounterMode(display=False) as counter:
        ssd_scan(x, dt, A, B, C, backend="reference")
    assert 2 * counter.get_total_flops() == 4 * heads * width * state * tokens * batch
    u, A = torch.randn(batch, tokens, width), -torch.rand(width, state)
    with FlopCounterMode(display=False) as counter:
        selective_scan(u, u.sigmoid(), A, B[:, :, 0], C[:, :, 0], backend="reference")
    assert 2 * counter.get_total_flops() == 4 * width * state * tokens * batch


def test_the_whole_is_what_ran_less_what_implementations_add() -> None:
    """A model of ordinary proportions: the blocks of attention and the chunks of the scan add a few percent."""
    model = model_of(hidden_size=256, window_size=16, mamba_head_dim=64, mamba_state_size=64, gate_rank=16)
    batch = batch_of(1)
    ran = counted(model, batch)
    whole = sum(ran.values()) + 2 * ran["attention"]  # its backward pass, see above
    assert 0.9 * whole < FlopCount(model)([batch]) < whole


def test_branch_dropout_takes_its_share_off() -> None:
    batch, rate = batch_of(1), 0.4
    plain, dropped = FlopCount(model_of())([batch]), FlopCount(model_of(drop_branch_prob=rate))([batch])
    without = [FlopCount(model_of(layer_branches=[branch] * 2))([batch]) for branch in ("mamba", "attention")]
    # A pruned layer's alignment is narrower as well; a dropped branch's stand-in still passes the whole one.
    narrower = 6 * 2 * (64 * 128) * batch.input_ids.numel()
    assert dropped == pytest.approx((1 - rate) * plain + rate / 2 * sum(value + narrower for value in without))


def test_rows_say_how_well_the_device_is_used(run_settings, tmp_path: Path) -> None:
    sections = run_settings(training={"max_steps": 3, "eval_interval": 0}, output_dir=str(tmp_path / "run"))
    sections["system"]["peak_tflops"] = 0.25
    fusiontree.train(sections)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.25)
        assert 0 < row["tflops"] < 1
        assert 0.1 < row["peak_memory_gib"] < 64
    # The rows' operations are those of their tokens: the same number a token in every row, about.
    per_token = [row["tflops"] / row["tokens_per_second"] for row in rows]
    assert max(per_token) < 1.1 * min(per_token)


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(1 << 27)  # 512 MiB, touched
    after = peak_memory_bytes(torch.device("cpu"))
    assert before is not None and after is not None
    assert after >= before and after >= held.nbytes
    del held
    assert peak_memory_bytes(torch.device("cpu")) > 0.99 * after  # the kernel counts in batches of pages
