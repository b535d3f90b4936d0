"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusiontree.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def dtype_named(name: str | None) -> torch.dtype | None:
    """The torch type of `--dtype`; None stays None.

    Raises:
        InputError: another name than those in `DTYPES`.
    """
    if name is None:
        return None
    if name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
