"""Which dtype a computation runs in."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("fusiontree.ops")


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def smallest_log_decay(dtype: torch.dtype) -> float:
    """Where logarithms of decays are cut off: about -70 in float32, a factor of 4e-31.

    Far below the rounding of any sum it could enter, and well above the denormal numbers, on which exp and matrix
    products run many times slower.
    """
    return 0.8 * math.log(torch.finfo(dtype).tiny)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product with x runs in: autocast's dtype where autocast is on (never for float64), else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Within it, what is computed on x's device runs in the dtypes of its arguments."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device_type=device, enabled=False)
    return nullcontext()  # much cheaper, and a decoding step passes here many times


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The fastest dtype at least as exact as `dtype` for matrix products.

    A CPU without bfloat16 instructions emulates them several times slower than it multiplies float32; half precision
    has no fast path on CPU at all.
    """
    if device.type != "cpu":
        return dtype
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not _cpu_multiplies_bfloat16()):
        return torch.float32
    return dtype


@lru_cache(maxsize=1)
def _cpu_multiplies_bfloat16() -> bool:
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        return True  # not x86: there is no telling, so the dtype asked for
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not supported:
        logger.info("this CPU has no bfloat16 instructions: attention and the loss multiply in float32")
    return supported
