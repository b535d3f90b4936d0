"""Which backends each op has on this machine, how long they take and how much they move, against the least possible.

The least possible (`Work`) counts the multiplications and additions that no algorithm for the op avoids, and every
input and output once (with a backward pass, their gradients too). Divided by what the machine reaches on a large matrix
product and on a large copy, measured in the same run, it gives the floor under the time; what fits into a cache may be
moved faster than that.

The bytes set against the least possible are on CPU those that tensor operations read and write, on CUDA the most that
was allocated at a time, inputs included.

Shapes: B batch, T tokens, H hidden, h Mamba heads, P head width, N state, D attention head width, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fusiontree import ops
from fusiontree.errors import first_line, is_out_of_memory
from fusiontree.ops.backends import BackendError, available_backends

H, P, N, D, V, WINDOW, TAPS = 384, 64, 64, 64, 4096, 256, 4
HEADS = H // P
GLOBAL_HEADS = 2
SIZES = f"H={H} P={P} N={N} (16 for selective_scan) D={D} V={V} window={WINDOW} global heads={GLOBAL_HEADS}"
#: A backend is not called again once its calls have taken this long.
SECONDS_ENOUGH = 2.0
#: Beyond this length the naive `reference` takes minutes a call, or all memory.
NAIVE_TOKENS = 2048
#: The backends made of tensor operations.
COUNTED_BACKENDS = ("torch", "reference")
#: Compiled at the first call, for longer than all else here takes; on CPU `auto` never takes them.
COMPILED = ("flex",)


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: operations (a multiplication or an addition each) and bytes read or written."""

    operations: float
    bytes: float

    def with_backward(self) -> Work:
        """Backward repeats each product twice, reads the outputs' gradients and writes the inputs'."""
        return Work(3 * self.operations, 2 * self.bytes)


@dataclass(frozen=True)
class Rates:
    """What the machine reaches: operations per second of a matrix product, bytes per second of a copy."""

    operations: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Seconds below which `work` cannot be done."""
        return max(work.operations / self.operations, work.bytes / self.bytes)


@dataclass(frozen=True)
class Measured:
    """One way of calling a backend. seconds: median of the calls; bytes: moved on CPU, held on CUDA, see the module;
    None on CPU for a backend that is a kernel of its own, whose traffic cannot be seen from here."""

    seconds: float
    bytes: float | None
    floor_seconds: float
    floor_bytes: float


@dataclass(frozen=True)
class OpTiming:
    """One backend of one op."""

    op: str
    backend: str
    usable: bool
    reason: str
    """Why a figure is missing; empty if none is."""
    forward: Measured | None = None
    training: Measured | None = None
    """Forward and backward; None also for ops that carry no gradient."""


@dataclass(frozen=True)
class _Case:
    """An op with its inputs: `call(backend)` is the forward pass, `leaves` want gradients in training."""

    call: Callable[[str], Any]
    leaves: list[torch.Tensor]
    work: Work
    trains: bool = True


def time_ops(
    device: torch.device, dtype: torch.dtype = torch.float32, *, batch: int = 1, tokens: int = 1024, rounds: int = 5
) -> tuple[list[OpTiming], Rates]:
    """Times every backend that works here, the backends of an op taking turns.

    Args:
        batch, tokens: B and T of the inputs; `cached_attention` reads T keys with one query.
        rounds: calls that count, after one that warms up.
    """
    rates, timings = measure_rates(device, dtype), []
    for op, backends in available_backends().items():
        held_before = _allocated(device)
        case = _CASES[op](batch, tokens, device, dtype)
        reasons = {name: _left_out(name, works, why, device, tokens) for name, (works, why) in backends.items()}
        forward = _measure(case, reasons, rates, rounds, device, held_before, trains=False)
        training = {}
        if case.trains:
            training = _measure(case, reasons, rates, rounds, device, held_before, trains=True)
        for name, (works, _) in backends.items():
            timings.append(OpTiming(op, name, works, reasons[name], forward.get(name), training.get(name)))
        del case  # or the next op would hold its inputs too
    return timings, rates


def _measure(
    case: _Case,
    reasons: dict[str, str],
    rates: Rates,
    rounds: int,
    device: torch.device,
    held_before: int,
    *,
    trains: bool,
) -> dict[str, Measured]:
    """The backends that have no reason yet not to be measured; one whose call fails gets one."""
    for leaf in case.leaves:
        leaf.requires_grad_(trains)
    calls = {name: partial(_call, case, name, trains) for name, reason in reasons.items() if not reason}
    failures, moved = _first_calls(calls, device, held_before)
    reasons.update({name: f"with backward: {why}" if trains else why for name, why in failures.items()})
    seconds = _take_turns({name: calls[name] for name in moved}, rounds, device)
    work = case.work.with_backward() if trains else case.work
    return {name: Measured(median(seconds[name]), moved[name], rates.floor(work), work.bytes) for name in moved}


def _left_out(name: str, works: bool, why: str, device: torch.device, tokens: int) -> str:
    """Why a backend is not called at all; empty if it is."""
    if not works:
        return f"not usable: {why}"
    if name == "reference" and tokens > NAIVE_TOKENS:
        return f"not measured beyond {NAIVE_TOKENS} tokens"
    if name in COMPILED and device.type == "cpu":
        return "not measured on CPU: compiling it takes longer than all else here, and `auto` does not take it there"
    return ""


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The machine's matrix product (2048 x 2048 in `dtype`) and copy (256 MiB), medians of five."""
    size = 2048
    a, b = (_normal(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(2**26, device=device)
    target = torch.empty_like(source)
    product = median([_seconds(lambda: a @ b, device) for _ in range(6)][1:])
    copy = median([_seconds(lambda: target.copy_(source), device) for _ in range(6)][1:])
    return Rates(operations=2 * size**3 / product, bytes=2 * source.numel() * 4 / copy)


def _call(case: _Case, backend: str, trains: bool) -> None:
    with torch.set_grad_enabled(trains):
        out = case.call(backend)
        if trains:
            torch.autograd.grad(out, case.leaves, torch.ones_like(out))


def _first_calls(
    calls: Mapping[str, Callable[[], None]], device: torch.device, held_before: int
) -> tuple[dict[str, str], dict[str, float | None]]:
    """Why calls fail, and the bytes of those that do not. One backend's failure leaves the others in the table."""
    failures: dict[str, str] = {}
    moved: dict[str, float | None] = {}
    for name, call in calls.items():
        try:
            counted = _bytes_of_call(call, device, held_before)
            moved[name] = counted if device.type == "cuda" or name in COUNTED_BACKENDS else None
        except BackendError as error:
            failures[name] = "refused: " + str(error).partition("cannot run this call: ")[2].rstrip(".")
        except Exception as error:
            failures[name] = (
                "needs more memory than there is"
                if is_out_of_memory(error)
                else f"{type(error).__name__}: {first_line(error)}"
            )
    return failures, moved


def _bytes_of_call(call: Callable[[], None], device: torch.device, held_before: int) -> float:
    if device.type != "cuda":
        with _Traffic() as traffic:
            call()
        return traffic.bytes
    call()  # what compiling or tuning a kernel allocates is not the call's
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return float(torch.cuda.max_memory_allocated(device) - held_before)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _take_turns(calls: Mapping[str, Callable[[], None]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if sum(seconds[name]) < SECONDS_ENOUGH:
                seconds[name].append(_seconds(call, device))
    return seconds


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now()
    call()
    return now() - started


class _Traffic(TorchDispatchMode):
    """Adds up what tensor operations read and write. Views and `empty` move nothing, a tensor that one operation reads
    twice counts once, and so does a number that is expanded.
    """

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and "empty" not in func._schema.name:
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
            unique = {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
            self.bytes += sum(_held(tensor) * tensor.element_size() for tensor in unique.values())
        return out


def _held(tensor: torch.Tensor) -> int:
    """Numbers of a tensor, each counted once however far it is expanded."""
    return math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)


def _normal(*shape: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _bytes(*tensors: torch.Tensor) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


def _ssd_scan(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    x = _normal(B, T, HEADS, P, device=device, dtype=dtype)
    dt = torch.rand(B, T, HEADS, device=device) * 0.1
    A = -torch.rand(HEADS, device=device)
    b, c = (_normal(B, T, 1, N, device=device, dtype=dtype) for _ in range(2))
    recurrent = 4 * T * HEADS * P * N  # each token into the state, the state read out
    quadratic = T * (T + 1) * (N + HEADS * P)  # each pair of tokens weighed, and weighted
    work = Work(B * min(recurrent, quadratic), _bytes(x, dt, b, c, x))
    return _Case(lambda backend: ops.ssd_scan(x, dt, A, b, c, backend=backend), [x, dt, A, b, c], work)


def _selective_scan(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    states = 16
    u = _normal(B, T, H, device=device, dtype=dtype)
    delta = torch.rand(B, T, H, device=device) * 0.1
    A = -torch.rand(H, states, device=device)
    b, c = (_normal(B, T, states, device=device, dtype=dtype) for _ in range(2))
    work = Work(6 * B * T * H * states, _bytes(u, delta, b, c, u))  # decay, input, sum and read-out of each state
    return _Case(lambda backend: ops.selective_scan(u, delta, A, b, c, backend=backend), [u, delta, A, b, c], work)


def _causal_conv1d(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    x, weight = _normal(B, T, H, device=device, dtype=dtype), _normal(H, TAPS, device=device, dtype=dtype)
    work = Work(2 * TAPS * B * T * H, _bytes(x, weight, x))
    return _Case(lambda backend: ops.causal_conv1d(x, weight, activation="silu", backend=backend), [x, weight], work)


def _gated_rms_norm(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    y, z = (_normal(B, T, H, device=device, dtype=dtype) for _ in range(2))
    weight, y_BTHP = _normal(H, device=device, dtype=torch.float32), y.unflatten(-1, (H // D, D)).detach()
    work = Work(8 * B * T * H, _bytes(y, z, weight, y))
    leaves = [y_BTHP.requires_grad_(), z, weight]
    return _Case(lambda backend: ops.gated_rms_norm(y_BTHP, z, weight, eps=1e-5, backend=backend), leaves, work)


def _gated_mix(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    logits, a, b = (_normal(B, T, H, device=device, dtype=dtype) for _ in range(3))
    work = Work(10 * B * T * H, _bytes(logits, a, b, a))
    return _Case(lambda backend: ops.gated_mix(logits, a, b, backend=backend)[0], [logits, a, b], work)


def _swiglu(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    x = _normal(B, T, 2 * H, device=device, dtype=dtype)
    work = Work(6 * B * T * H, 1.5 * _bytes(x))
    return _Case(lambda backend: ops.swiglu(x, backend=backend), [x], work)


def _rotary(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    x = _normal(B, T, H // D, D, device=device, dtype=dtype)
    angle = torch.rand(1, T, D // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    work = Work(3 * B * T * H, _bytes(x, cos, sin, x))
    return _Case(lambda backend: ops.apply_rotary(x, cos, sin, backend=backend), [x], work)


def _local_global_attention(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    heads = H // D
    q, k, v = (_normal(B, T, heads, D, device=device, dtype=dtype) for _ in range(3))
    window = min(WINDOW, T)
    seen_local = T * window - window * (window - 1) / 2
    pairs = (heads - GLOBAL_HEADS) * seen_local + GLOBAL_HEADS * T * (T + 1) / 2
    work = Work(4 * B * D * pairs, _bytes(q, k, v, q))
    return _Case(
        lambda backend: ops.local_global_attention(
            q, k, v, window_size=WINDOW, num_global_heads=GLOBAL_HEADS, backend=backend
        ),
        [q, k, v],
        work,
    )


def _cached_attention(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
    heads = H // D
    k, v = (_normal(B, T, heads, D, device=device, dtype=dtype) for _ in range(2))
    q = _normal(B, 1, heads, D, device=device, dtype=dtype)
    places = torch.arange(T, device=device).expand(B, T)
    work = Work(4 * B * T * heads * D, _bytes(q, k, v, q))
    return _Case(
        lambda backend: ops.cached_attention(q, k, v, query_index=places[:, -1:], key_index=places, backend=backend),
        [],
        work,
        trains=False,
    )


def _cross_entropy(op: Callable[..., Any], *, trains: bool) -> Callable[[int, int, torch.device, torch.dtype], _Case]:
    def build(B: int, T: int, device: torch.device, dtype: torch.dtype) -> _Case:
        hidden, weight = _normal(B, T, H, device=device, dtype=dtype), _normal(V, H, device=device, dtype=dtype)
        labels = torch.arange(T, device=device).expand(B, T) % V
        work = Work(2 * B * T * H * V, _bytes(hidden, weight, labels))
        return _Case(lambda backend: op(hidden, weight, labels, backend=backend), [hidden, weight], work, trains)

    return build


_CASES: dict[str, Callable[[int, int, torch.device, torch.dtype], _Case]] = {
    "ssd_scan": _ssd_scan,
    "selective_scan": _selective_scan,
    "causal_conv1d": _causal_conv1d,
    "gated_rms_norm": _gated_rms_norm,
    "gated_mix": _gated_mix,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "local_global_attention": _local_global_attention,
    "cached_attention": _cached_attention,
    "linear_cross_entropy": _cross_entropy(ops.linear_cross_entropy, trains=True),
    "token_cross_entropy": _cross_entropy(ops.token_cross_entropy, trains=False),
}
