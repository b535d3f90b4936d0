"""A model large enough for the C++ kernels learns as it does with torch's operations."""

from __future__ import annotations

import pytest
import torch

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.ops import backends, cpu_attention, cpu_kernels

pytestmark = pytest.mark.skipif(cpu_kernels.unusable() is not None, reason="needs a C++ compiler")
OPS = {"ssd_scan", "causal_conv1d", "gated_rms_norm", "gated_mix", "rotary", "swiglu"}


@pytest.mark.parametrize(("mixed", "tolerance"), [(False, 1e-4), (True, 2e-2)])
def test_loss_and_gradients_are_those_of_torchs_operations(
    mixed: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Packed documents included. The tolerance is relative to the largest gradient of each parameter."""
    torch.manual_seed(0)
    config = HybridLanguageModelConfig(
        vocab_size=64, hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, gate_rank=8, window_size=64
    )
    model = HybridLanguageModel(config).train()
    ids = torch.randint(64, (2, 512))
    positions = torch.cat([torch.arange(200), torch.arange(312)]).expand(2, -1)

    def learn() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = model(ids, position_ids=positions, labels=ids).loss
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    monkeypatch.setattr(cpu_kernels, "FEWEST_ELEMENTS", 2**16)
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level("INFO", logger="fusiontree.ops"):
        loss, gradients = learn()
    attends = mixed and cpu_attention.unusable() is None
    ops = OPS | {"local_global_attention"} if attends else OPS
    assert {line.partition(":")[0] for line in caplog.messages if "backend cpp (auto)" in line} == ops
    monkeypatch.setattr(cpu_kernels, "FEWEST_ELEMENTS", 2**62)
    caplog.clear()
    with caplog.at_level("INFO", logger="fusiontree.ops"):
        expected, wanted = learn()
    assert {line.partition(":")[0] for line in caplog.messages if "backend torch (auto)" in line} >= ops
    assert loss == pytest.approx(expected, rel=tolerance / 10)
    assert gradients.keys() == wanted.keys()
    least = 1e-2 * max(want.abs().max() for want in wanted.values())  # keys' biases have none but of rounding
    for name, want in wanted.items():
        assert (gradients[name] - want).abs().max() <= tolerance * max(least, want.abs().max()), name
