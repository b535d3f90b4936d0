"""Which implementation of an op runs, and why.

Every op is registered under one or more backend names with one signature. `resolve` picks one: a named backend is
used or refused with a `BackendError`, never replaced in silence; `"auto"` takes the first registered backend that
works here, honours the arguments and pays for them, and never the naive `reference`. What was taken is logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

logger = logging.getLogger("fusiontree.ops")

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BackendError(ValueError):
    """A named backend does not exist, does not work on this machine, or cannot honour an argument of the call."""


@dataclass(frozen=True)
class _Backend:
    function: Callable[..., Any]
    find_unusable: Callable[[], str | None]
    refuses: Callable[..., str | None]
    auto_declines: Callable[..., str | None]

    @cached_property
    def unusable(self) -> str | None:
        return self.find_unusable()

    def objection(self, *tensors: torch.Tensor | None, **arguments: Any) -> str | None:
        return self.unusable or self.refuses(*tensors, **arguments)


_REGISTRY: dict[str, dict[str, _Backend]] = {}
_announced: set[tuple[str, str]] = set()


def refuse_other_dtypes(*tensors: torch.Tensor | None, **arguments: Any) -> str | None:
    """The refusal shared by the `reference` and `torch` backends: anything but the four floating dtypes."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in FLOATING:
            return f"it does not support dtype {tensor.dtype}"
    return None


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    *,
    unusable: Callable[[], str | None] = lambda: None,
    refuses: Callable[..., str | None] = refuse_other_dtypes,
    auto_declines: Callable[..., str | None] = lambda *tensors, **arguments: None,
) -> None:
    """Add a backend to an op; the order of registration is the order in which `"auto"` tries them.

    `unusable()` says why it cannot run on this machine (None: it can); it is asked once, when the backend is first
    considered, so that looking for an optional library costs nothing before. `refuses(*tensors, **arguments)` looks at
    the arguments of one call, as `resolve` got them, and says why the backend cannot honour them (None: it can).
    `auto_declines`, with the same arguments, says why `"auto"` leaves to a later backend what this one could do.
    """
    _REGISTRY.setdefault(op, {})[backend] = _Backend(function, unusable, refuses, auto_declines)


def resolve(op: str, backend: str, *tensors: torch.Tensor | None, **arguments: Any) -> Callable[..., Any]:
    """The function that runs `op`, for the backend asked for and the arguments of this call.

    `tensors` are those of a floating dtype (None where absent), `arguments` whatever else a backend may refuse.

    Raises BackendError when a named backend is unknown, unusable here, or refuses these arguments, and when `"auto"`
    finds none.
    """
    candidates = _REGISTRY[op]
    if backend == "auto" and torch.compiler.is_compiling():
        return candidates["torch"].function  # made of operations that the compiler sees into
    if backend == "auto":
        reasons = {}
        for name, candidate in candidates.items():
            reason = candidate.objection(*tensors, **arguments) or candidate.auto_declines(*tensors, **arguments)
            if name != "reference" and reason is None:
                return _take(op, name, candidate, "auto")
            if reason is not None:
                reasons[name] = reason
        raise BackendError(f"No backend of {op} can run this call ({'; '.join(map(': '.join, reasons.items()))}).")
    if backend not in candidates:
        raise BackendError(f"{op} has no backend {backend!r}; choose one of {', '.join(candidates)} or auto.")
    reason = candidates[backend].objection(*tensors, **arguments)
    if reason is not None:
        raise BackendError(f"Backend {backend!r} of {op} cannot run this call: {reason}.")
    return _take(op, backend, candidates[backend], "named")


def _take(op: str, name: str, backend: _Backend, how: str) -> Callable[..., Any]:
    if (op, name) not in _announced:
        _announced.add((op, name))
        logger.info("%s: backend %s (%s)", op, name, how)
    return backend.function


def available_backends() -> dict[str, dict[str, tuple[bool, str]]]:
    """For each op, each backend's name with whether it works on this machine, and why (not)."""
    return {
        op: {name: (b.unusable is None, b.unusable or "works here") for name, b in backends.items()}
        for op, backends in _REGISTRY.items()
    }
