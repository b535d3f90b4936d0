"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def working(command: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that shows, where that is a terminal, what a long command is doing: call it with a few words."""
    from rich.console import Console

    with Console(stderr=True).status(command) as status:
        yield lambda what: status.update(f"{command}: {what}")
