"""The adapter of flash-attn, on a stand-in with its signatures. The library itself: test_gpu_attention.py."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from op_comparison import assert_close, run_with_gradients
from test_local_global_attention import arguments, packed_positions
from torch._subclasses.fake_tensor import FakeTensorMode

from fusiontree.ops import (
    BackendError,
    attention_layout,
    attention_libraries,
    local_global_attention,
    reference,
)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """What flash-attn documents of its function, as far as it is used here."""
    assert causal and not (dropout_p or softmax_scale or softcap or alibi_slopes or return_attn_probs)
    left, right = window_size
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(k.shape[1])
    seen = (distance >= 0) & ((distance <= left) | (left < 0)) & ((distance >= -right) | (right < 0))
    return reference.masked_attention(q, k, v, seen[None])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert q.dim() == 3 and cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q)
    lengths = cu_seqlens_q.diff().tolist()
    assert min(lengths) > 0 and max(lengths) == max_seqlen_q == max_seqlen_k
    documents = (torch.split(t, lengths) for t in (q, k, v))
    options = {"causal": causal, "window_size": window_size, "deterministic": deterministic}
    return torch.cat([flash_attn_func(*(t[None] for t in qkv), **options)[0] for qkv in zip(*documents, strict=True)])


@pytest.fixture
def library(monkeypatch):
    stand_in = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setattr(attention_libraries, "_library", lambda: stand_in)


def through_the_adapter(q, k, v, *, position_ids=None, **options):
    layout = attention_layout(position_ids, q.shape[1])
    return attention_libraries.local_global_flash(q, k, v, layout=layout, **options)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "num_global_heads"), [(4, 4, 0), (4, 4, 4), (6, 3, 2), (8, 2, 4)])
@pytest.mark.parametrize(("length", "window_size"), [(1, 1), (7, 1), (50, 9), (50, 100)])
def test_agrees_with_reference(library, length, window_size, heads, kv_heads, num_global_heads, packed):
    options = {"window_size": window_size, "num_global_heads": num_global_heads}
    options["position_ids"] = packed_positions(length) if packed else None
    case = arguments(length, heads, kv_heads)
    expected = run_with_gradients(local_global_attention, case, backend="reference", **options)
    assert_close(run_with_gradients(through_the_adapter, case, **options), expected, 1e-11)


def test_documents_of_all_rows_are_laid_end_to_end():
    positions = torch.tensor([[3, 4, 0, 1, 2], [0, 0, 1, 2, 0]])
    ends, longest = attention_libraries.cumulative_lengths(attention_layout(positions, 5))
    assert ends.tolist() == [0, 2, 5, 6, 9, 10] and longest == 3


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that puts a package in reach, on a machine with a CUDA device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)

    def install(version, code):
        (tmp_path / "flash_attn.py").write_text(code)
        if version is not None:
            information = tmp_path / f"flash_attn-{version}.dist-info"
            information.mkdir()
            (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n")

    yield install
    sys.modules.pop("flash_attn", None)


@pytest.mark.parametrize(
    ("version", "code", "reason"),
    [
        ("2.8.3", "", None),
        ("2.2.0", "", "flash-attn 2.2.0 is installed, 2.5.5 or newer is needed"),
        (
            "2.8.3",
            "raise OSError('undefined symbol')",
            "flash-attn 2.8.3 is installed but cannot be imported: undefined",
        ),
        (None, "", "flash_attn can be imported but is not FlashAttention-2"),
    ],
)
def test_an_installation_that_does_not_work_is_named(installed, version, code, reason):
    installed(version, code)
    found = attention_libraries.find_unusable()
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "runs on CUDA tensors, not on cpu"),
        ({"device": "cuda"}, "does not support dtype torch.float32"),
        ({"device": "cuda", "dtype": torch.bfloat16, "width": 264}, "heads of up to 256 channels, not 264"),
        ({"device": "cuda", "dtype": torch.bfloat16}, "needs a GPU of compute capability 8.0, not 7.5"),
    ],
)
def test_what_it_cannot_honour_is_refused(change, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    change = {"width": 16, "dtype": torch.float32, "device": "cpu"} | change
    with FakeTensorMode():
        q = torch.empty(1, 3, 2, change.pop("width"), **change)
    assert reason in attention_libraries.refuses(q, q, q)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_the_library_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "flash_attn.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_libraries.find_unusable() == "it needs a CUDA device"
    qkv = torch.zeros(3, 1, 3, 2, 16, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="'flash_attn' .* cannot run this call: it needs a CUDA device"):
        local_global_attention(*qkv, window_size=2, num_global_heads=1, backend="flash_attn")
