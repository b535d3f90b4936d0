"""How the optional libraries' kernels are called, and what is refused for them.

The kernels need CUDA, so a stand-in with the documented signature of each takes its place here: a few lines that
compute what the library documents. What is tested is our side, the mapping of tensors, states and resets onto that
signature. `test_gpu_backends.py` tests the libraries themselves.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from op_comparison import assert_agrees_with_reference
from test_causal_conv1d import arguments as conv_arguments
from test_selective_scan import arguments as selective_arguments
from test_ssd import arguments as ssd_arguments

from fusiontree.ops import backends, causal_conv1d, reference, scan_libraries, selective_scan, ssd_scan


@pytest.fixture
def install(monkeypatch):
    """install(op, backend, function, module, **kernels): the backend of a library whose module has these kernels."""

    def put(op, backend, function, module, **kernels):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**kernels))
        registered = dict(backends._REGISTRY[op])
        monkeypatch.setitem(backends._REGISTRY, op, registered)
        backends.register(op, backend, function)

    return put


def chunk_simple_gla(q, k, v, g, *, scale, initial_state, output_final_state, cu_seqlens):
    """fla.ops.simple_gla: q, k [B,T,H,K], v [B,T,H,V], g [B,T,H] log decays, initial_state [S,H,K,V] float32,
    cu_seqlens [S+1] int64 with B = 1; each document starts from its own state."""
    bounds = [(0, q.shape[1])] if cu_seqlens is None else list(zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True))
    assert cu_seqlens is None or (len(q) == 1 and cu_seqlens.dtype == torch.int64)
    assert initial_state is None or len(initial_state) == (len(q) if cu_seqlens is None else len(bounds))
    outputs, finals = [], []
    for i, (start, stop) in enumerate(bounds):
        state = v.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3])
        if initial_state is not None:
            assert initial_state.dtype == torch.float32 and initial_state.is_contiguous()
            state = initial_state if cu_seqlens is None else initial_state[i : i + 1]
        for t in range(int(start), int(stop)):
            added = k[:, t, :, :, None] * v[:, t, :, None, :]
            state = torch.exp(g[:, t])[..., None, None] * state + added
            outputs.append(torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state))
        finals.append(state)
    return torch.stack(outputs, 1), torch.cat(finals) if output_final_state else None


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, initial_states, seq_idx, return_final_states):
    """mamba_ssm: as ssd_scan; seq_idx [B,T] int32 numbers the sequences of a row, and initial_states belongs to 0."""
    assert chunk_size & (chunk_size - 1) == 0
    reset = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        reset = torch.diff(seq_idx, dim=1, prepend=torch.zeros_like(seq_idx[:, :1])) != 0
    options = {"reset": reset, "initial_state": initial_states, "return_final_state": return_final_states}
    return reference.ssd_scan(x, dt, A, B, C, D, **options)


def selective_scan_fn(u, delta, A, B, C, D, z=None, return_last_state=False):
    """mamba_ssm: u, delta, z [B,d,T], B, C [B,N,T], of one dtype; last_state [B,d,N] without gradient."""
    assert len({t.dtype for t in (u, delta, B, C)}) == 1 and A.dtype == torch.float32
    u, delta, B, C, z = (None if t is None else t.transpose(1, 2) for t in (u, delta, B, C, z))
    y, state = reference.selective_scan(u, delta, A, B, C, D, z, return_final_state=True)
    return (y.transpose(1, 2), state.detach()) if return_last_state else y.transpose(1, 2)


def causal_conv1d_fn(x, weight, bias, seq_idx, activation):
    """causal_conv1d: x [B,d,T] with channels in one run of memory, and all strides and addresses multiples of 8; taps
    see the tokens of their own number in seq_idx [B,T] int32."""
    assert x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and x.data_ptr() % 16 == 0
    taps = weight.shape[1]
    padded = F.pad(x, (taps - 1, 0)).unfold(2, taps, 1)  # [B,d,T,K]
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        number = F.pad(seq_idx, (taps - 1, 0), value=-1).unfold(1, taps, 1)
        padded = padded * (number == seq_idx[..., None])[:, None]
    y = (padded * weight[:, None]).sum(-1)
    y = y if bias is None else y + bias[:, None]
    return F.silu(y) if activation == "silu" else y


@pytest.mark.parametrize(
    ("backend", "function", "module", "kernel"),
    [
        ("fla", scan_libraries.ssd_fla, scan_libraries.SIMPLE_GLA, chunk_simple_gla),
        ("mamba_ssm", scan_libraries.ssd_mamba, scan_libraries.MAMBA2, mamba_chunk_scan_combined),
    ],
)
@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("length", [1, 11])
def test_ssd_scan(install, backend, function, module, kernel, length, initial, resets):
    install("ssd_scan", backend, function, module, **{kernel.__name__: kernel})
    case = ssd_arguments(length, groups=2, initial=initial, resets=resets, skip=initial, dtype=torch.float32)
    if resets and length > 1:
        case["reset"][0, 0], case["reset"][1, 0] = True, False
    assert_agrees_with_reference(ssd_scan, case, backend=backend, return_final_state=True, chunk_size=24)


@pytest.mark.parametrize("backend", ["fla", "mamba_ssm"])
def test_a_row_that_starts_anew_hands_no_state_on(install, backend):
    kernels = {"fla": chunk_simple_gla, "mamba_ssm": mamba_chunk_scan_combined}
    modules = {"fla": scan_libraries.SIMPLE_GLA, "mamba_ssm": scan_libraries.MAMBA2}
    function = {"fla": scan_libraries.ssd_fla, "mamba_ssm": scan_libraries.ssd_mamba}[backend]
    install("ssd_scan", backend, function, modules[backend], **{kernels[backend].__name__: kernels[backend]})
    case = ssd_arguments(4, initial=True, resets=True, dtype=torch.float32)
    case["reset"][:, 0] = True
    case["initial_state"].fill_(float("nan"))
    y, state = ssd_scan(**case, return_final_state=True, backend=backend)
    assert y.isfinite().all() and state.isfinite().all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("length", [1, 11])
def test_selective_scan(install, length, gated):
    install(
        "selective_scan",
        "mamba_ssm",
        scan_libraries.selective_mamba,
        scan_libraries.MAMBA1,
        selective_scan_fn=selective_scan_fn,
    )
    case = selective_arguments(length, gated=gated, dtype=torch.float32)
    assert_agrees_with_reference(selective_scan, case, backend="mamba_ssm")
    y, state = selective_scan(**case, return_final_state=True, backend="mamba_ssm")
    expected = selective_scan(**case, return_final_state=True, backend="reference")
    torch.testing.assert_close((y, state), expected, rtol=1e-5, atol=1e-5)
    case["u"] = case["u"].bfloat16()  # its step sizes stay float32
    y = selective_scan(**case, backend="mamba_ssm")
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (13, 3)])
def test_causal_conv1d(install, length, taps, initial, resets):
    install(
        "causal_conv1d",
        "causal_conv1d",
        scan_libraries.conv_library,
        scan_libraries.CONV,
        causal_conv1d_fn=causal_conv1d_fn,
    )
    case = conv_arguments(length, taps, channels=8, initial=initial, resets=resets, dtype=torch.float32)
    wide = torch.randn(2, length, 13)
    wide[..., 3:11] = case["x"]
    options = {"activation": "silu", "return_final_state": True, "backend": "causal_conv1d"}
    assert_agrees_with_reference(causal_conv1d, case, **options)
    strided = causal_conv1d(**case | {"x": wide[..., 3:11]}, **options)
    torch.testing.assert_close(strided, causal_conv1d(**case, **options))


def test_what_a_library_cannot_honour_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(scan_libraries, "refuse_cpu", lambda *tensors: None)  # as if the tensors were on a device

    def why(refuses, op, case, **arguments):
        names = {"ssd_scan": "x dt A B C D", "selective_scan": "u delta A B C D z", "causal_conv1d": "x weight bias"}
        tensors = [case[name] for name in [*names[op].split(), "initial_state"]]
        return refuses(*tensors, reset=case["reset"], **arguments)

    ssd = scan_libraries.ssd_library_refuses
    single = ssd_arguments(dtype=torch.float32)
    assert "dtype torch.float64" in why(ssd, "ssd_scan", ssd_arguments())
    assert "TF32" in why(ssd, "ssd_scan", single)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert why(ssd, "ssd_scan", single) is None
    assert why(ssd, "ssd_scan", ssd_arguments(dtype=torch.bfloat16, resets=True, initial=True)) is None

    mamba1 = scan_libraries.selective_mamba_refuses
    for changes, final, reason in (
        ({}, False, None),
        ({"resets": True}, False, "reset"),
        ({"initial": True}, False, "initial state"),
        ({"state": 257}, False, "more than 256"),
        ({"dtype": torch.float64}, False, "dtype torch.float64"),
    ):
        case = selective_arguments(**{"dtype": torch.float32, **changes})
        found = why(mamba1, "selective_scan", case, return_final_state=final)
        assert found is None if reason is None else reason in found
    case = selective_arguments(dtype=torch.float32)
    assert why(mamba1, "selective_scan", case, return_final_state=True) is None
    case["u"].requires_grad_()
    assert "gradient" in why(mamba1, "selective_scan", case, return_final_state=True)

    conv = scan_libraries.conv_library_refuses
    assert why(conv, "causal_conv1d", conv_arguments(channels=8, dtype=torch.float32)) is None
    assert "5" in why(conv, "causal_conv1d", conv_arguments(channels=8, taps=5, dtype=torch.float32))
    assert "multiple of 8" in why(conv, "causal_conv1d", conv_arguments(dtype=torch.float32))


def test_a_library_that_is_missing_or_broken_says_so(monkeypatch, tmp_path):
    assert scan_libraries.library_unusable("no-such", "no_such.kernels")() == "the package no-such is not installed"
    (tmp_path / "broken_kernels.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    unusable = scan_libraries.library_unusable("broken-kernels", "broken_kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert unusable() == "it needs a CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert unusable() == "broken-kernels is installed but cannot be imported (OSError: undefined symbol)"
