"""The Triton kernels against the reference, on CPU under Triton's interpreter.

`test_triton_kernels.py` runs this file in a process of its own: the interpreter is chosen when triton is imported.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import test_causal_conv1d
import test_selective_scan
import test_ssd
import torch
from op_comparison import assert_agrees_with_reference, assert_close, nan_in_fresh_memory, run_with_gradients

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.ops import BackendError, backends, causal_conv1d, selective_scan, selective_scan_triton, ssd_scan
from fusiontree.ops.triton_support import interpreting

assert interpreting()

ssd_arguments = partial(test_ssd.arguments, dtype=torch.float32)
selective_arguments = partial(test_selective_scan.arguments, dtype=torch.float32)
conv_arguments = partial(test_causal_conv1d.arguments, dtype=torch.float32)


def agrees(op: Any, case: dict[str, Any], **options: Any) -> None:
    with nan_in_fresh_memory():
        assert_agrees_with_reference(op, case, backend="triton", return_final_state=True, **options)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and several blocks of channels in several programs, from a few tokens and channels."""
    monkeypatch.setattr(selective_scan_triton, "LONGEST_CHUNK", 4)
    monkeypatch.setattr(selective_scan_triton, "TILE_ELEMENTS", 32)
    monkeypatch.setattr(selective_scan_triton, "MOST_BLOCKS", 2)


@pytest.mark.parametrize(
    "case",
    [
        {"length": 1, "initial": True},
        {"length": 1, "initial": True, "resets": True},
        {"length": 16, "heads": 2},
        {"length": 37, "groups": 2, "initial": True, "resets": True},
        {"length": 18, "heads": 6, "groups": 2, "initial": True, "skip": False},
        {"length": 20, "heads": 1, "batch": 1, "width": 37, "state": 70, "resets": True},
    ],
    ids=str,
)
def test_ssd_scan(case: dict[str, Any]) -> None:
    agrees(ssd_scan, ssd_arguments(**case), chunk_size=16)


def test_ssd_scan_with_extreme_decays() -> None:
    case = ssd_arguments(50, initial=True, resets=True)
    case["dt"] = case["dt"] * torch.tensor([1e-8, 1.0, 10.0, 100.0])
    agrees(ssd_scan, case)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "case",
    [
        {"length": 1, "initial": True},
        {"length": 1, "initial": True, "resets": True},
        {"length": 8, "gated": False},
        {"length": 11, "initial": True, "resets": True},
        {"length": 9, "initial": True, "channels": 10, "state": 4},
    ],
    ids=str,
)
def test_selective_scan(case: dict[str, Any]) -> None:
    agrees(selective_scan, selective_arguments(**{"batch": 1, "channels": 3, **case}))


@pytest.mark.usefixtures("small_tiles")
def test_selective_scan_with_extreme_decays() -> None:
    case = selective_arguments(9, batch=1, channels=4, initial=True, resets=True)
    case["delta"] = case["delta"] * torch.tensor([1e-8, 1.0, 30.0, 1e3])
    agrees(selective_scan, case)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(
    ("length", "taps", "activation"), [(1, 4, "silu"), (2, 4, None), (3, 2, "silu"), (70, 4, "silu"), (5, 1, None)]
)
def test_causal_conv1d(length: int, taps: int, activation: str | None, initial: bool, resets: bool) -> None:
    case = conv_arguments(length, taps, channels=70, initial=initial, resets=resets, bias=taps != 2)
    agrees(causal_conv1d, case, activation=activation)


OPS = [
    (ssd_scan, ssd_arguments, {"chunk_size": 16}),
    (selective_scan, partial(selective_arguments, channels=2, state=2), {}),
    (causal_conv1d, conv_arguments, {"activation": "silu"}),
]
each_op = pytest.mark.parametrize(("op", "arguments", "options"), OPS, ids=[op.__name__ for op, _, _ in OPS])


@each_op
@pytest.mark.usefixtures("small_tiles")
def test_strided_inputs(op: Any, arguments: Any, options: dict[str, Any]) -> None:
    case = {
        name: t.transpose(0, 1).contiguous().transpose(0, 1) if t is not None and t.dim() > 1 else t
        for name, t in arguments(7, resets=True, initial=True).items()
    }
    assert any(t is not None and not t.is_contiguous() for t in case.values())
    agrees(op, case, **options)


@each_op
@pytest.mark.usefixtures("small_tiles")
def test_a_row_that_starts_anew_ignores_its_initial_state(op: Any, arguments: Any, options: dict[str, Any]) -> None:
    case = arguments(5, initial=True)
    case["reset"] = torch.zeros(2, 5, dtype=torch.bool)
    case["reset"][0, 0] = True
    dirty = case | {"initial_state": case["initial_state"].clone()}
    dirty["initial_state"][0] = float("nan")
    case["initial_state"][0] = 0
    options = options | {"return_final_state": True, "backend": "triton"}
    actual = run_with_gradients(op, dirty, **options)
    assert_close(actual, run_with_gradients(op, case, **options), 1e-6)
    assert actual["gradient of initial_state"][0].eq(0).all()


@pytest.mark.usefixtures("small_tiles")
def test_a_step_of_zero_leaves_the_state_exactly_as_it_was() -> None:
    case = ssd_arguments(20, initial=True)
    case["dt"].zero_()
    _, state = ssd_scan(**case, return_final_state=True, backend="triton")
    assert torch.equal(state, case["initial_state"])
    case = selective_arguments(6, batch=1, channels=2, initial=True)
    case["delta"].zero_()
    _, state = selective_scan(**case, return_final_state=True, backend="triton")
    assert torch.equal(state, case["initial_state"])


@each_op
def test_float64_is_refused(op: Any, arguments: Any, options: dict[str, Any]) -> None:
    case = {n: t.double() if t is not None and t.is_floating_point() else t for n, t in arguments(3).items()}
    with pytest.raises(
        BackendError, match="'triton' of .* cannot run this call: it does not support dtype torch.float64"
    ):
        op(**case, backend="triton", **options)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("version", [1, 2])
def test_a_model_trains_and_decodes_alike_with_them(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` takes them here; without them it takes `torch`."""
    torch.manual_seed(0)
    config = HybridLanguageModelConfig(
        vocab_size=13, hidden_size=4, num_layers=1, num_heads=2, global_heads=1, window_size=4, mamba_head_dim=4,
        mamba_expand=1, mamba_state_size=2, mamba_version=version, gate_rank=2, srte_rank=2,
    )  # fmt: skip
    model = HybridLanguageModel(config).eval()
    ids = torch.randint(0, 13, (1, 7))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, position_ids=positions, labels=ids).loss.backward()
        results = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            past = model(input_ids=ids[:, :5], position_ids=positions[:, :5], use_cache=True)
            rest = model(input_ids=ids[:, 5:6], past_key_values=past.past_key_values, use_cache=True)
        return results | {"prefill": past.logits, "step": rest.logits}

    interpreted = run()
    taken = {op for op, backend in backends._announced if backend == "triton"}
    assert {"causal_conv1d", "ssd_scan" if version == 2 else "selective_scan"} <= taken
    for op in backends._REGISTRY:
        without = {name: b for name, b in backends._REGISTRY[op].items() if name != "triton"}
        monkeypatch.setitem(backends._REGISTRY, op, without)
    assert_close(interpreted, run(), 1e-5)
