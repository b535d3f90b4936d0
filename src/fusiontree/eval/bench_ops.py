"""Which backends each op has on this machine, and how long they take.

Shapes: B batch, T tokens, H hidden, h Mamba heads, P head width, N state, D attention head width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from fusiontree import ops
from fusiontree.ops.backends import available_backends

B, T, H, P, N, D, V = 1, 512, 256, 64, 64, 64, 1024
HEADS = H // P
WINDOW = 64
SIZES = f"B={B} T={T} H={H} P={P} N={N} D={D} V={V} window={WINDOW}, forward, T=1 queries for cached_attention"


@dataclass(frozen=True)
class OpTiming:
    """One backend of one op."""

    op: str
    backend: str
    usable: bool
    reason: str
    """Why it is usable here or not."""
    milliseconds: float | None
    """Median of one forward call; None if it is not usable."""


def time_ops(device: torch.device, dtype: torch.dtype = torch.float32, rounds: int = 5) -> list[OpTiming]:
    """Times the forward pass of every backend that works here, the backends of an op taking turns."""
    timings = []
    for op, backends in available_backends().items():
        call = _CALLS[op](device, dtype)
        usable = [name for name, (works, _) in backends.items() if works]
        seconds: dict[str, list[float]] = {name: [] for name in usable}
        for turn in range(rounds + 1):
            for name in usable:
                taken = _seconds(call, name, device)
                if turn > 0:
                    seconds[name].append(taken)
        for name, (works, reason) in backends.items():
            timings.append(OpTiming(op, name, works, reason, 1e3 * median(seconds[name]) if works else None))
    return timings


@torch.no_grad()
def _seconds(call: Callable[[str], object], backend: str, device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now()
    call(backend)
    return now() - started


Call = Callable[[str], object]


def _normal(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _ssd_scan(device: torch.device, dtype: torch.dtype) -> Call:
    x = _normal(B, T, HEADS, P, device=device, dtype=dtype)
    dt = torch.rand(B, T, HEADS, device=device) * 0.1
    A = -torch.rand(HEADS, device=device)
    bc = _normal(B, T, 1, N, device=device, dtype=dtype)
    return lambda backend: ops.ssd_scan(x, dt, A, bc, bc, backend=backend)


def _selective_scan(device: torch.device, dtype: torch.dtype) -> Call:
    u = _normal(B, T, H, device=device, dtype=dtype)
    delta = torch.rand(B, T, H, device=device) * 0.1
    A = -torch.rand(H, 16, device=device)
    bc = _normal(B, T, 16, device=device, dtype=dtype)
    return lambda backend: ops.selective_scan(u, delta, A, bc, bc, backend=backend)


def _causal_conv1d(device: torch.device, dtype: torch.dtype) -> Call:
    x, weight = _normal(B, T, H, device=device, dtype=dtype), _normal(H, 4, device=device, dtype=dtype)
    return lambda backend: ops.causal_conv1d(x, weight, activation="silu", backend=backend)


def _local_global_attention(device: torch.device, dtype: torch.dtype) -> Call:
    qkv = _normal(B, T, H // D, D, device=device, dtype=dtype)
    return lambda backend: ops.local_global_attention(
        qkv, qkv, qkv, window_size=WINDOW, num_global_heads=1, backend=backend
    )


def _cached_attention(device: torch.device, dtype: torch.dtype) -> Call:
    kv = _normal(B, T, H // D, D, device=device, dtype=dtype)
    places = torch.arange(T, device=device)[None].expand(B, T)
    return lambda backend: ops.cached_attention(
        kv[:, -1:], kv, kv, query_index=places[:, -1:], key_index=places, backend=backend
    )


def _cross_entropy(op: Callable[..., object]) -> Callable[[torch.device, torch.dtype], Call]:
    def build(device: torch.device, dtype: torch.dtype) -> Call:
        hidden, weight = _normal(B, T, H, device=device, dtype=dtype), _normal(V, H, device=device, dtype=dtype)
        labels = torch.arange(T, device=device)[None].expand(B, T) % V
        return lambda backend: op(hidden, weight, labels, backend=backend)

    return build


_CALLS: dict[str, Callable[[torch.device, torch.dtype], Call]] = {
    "ssd_scan": _ssd_scan,
    "selective_scan": _selective_scan,
    "causal_conv1d": _causal_conv1d,
    "local_global_attention": _local_global_attention,
    "cached_attention": _cached_attention,
    "linear_cross_entropy": _cross_entropy(ops.linear_cross_entropy),
    "token_cross_entropy": _cross_entropy(ops.token_cross_entropy),
}
