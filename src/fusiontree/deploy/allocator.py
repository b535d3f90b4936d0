"""How the C library hands out the memory of a process that runs for days."""

from __future__ import annotations

import ctypes
import os
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3

_APART = 4 * 2**20  # smaller than the buffers of states, larger than what one step computes with
_KEPT = 64 * 2**20  # free bytes at the end of the heap, so that what a step gives back is not asked for anew


def keep_large_blocks_apart() -> None:
    """Blocks of 4 MiB and more go back to the system as soon as they are freed. Linux with glibc; elsewhere nothing.

    By default glibc takes the largest block that was ever freed, up to 32 MiB, as the size from which on blocks lie
    apart. The buffers of states, which grow and shrink with the texts that run, then lie in the heap between blocks
    that stay, and their room is lost to everything larger. Whoever has set glibc's own variables is left alone.
    """
    own = os.environ.keys() & {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    if not sys.platform.startswith("linux") or own or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _APART)
        mallopt(_TRIM_THRESHOLD, _KEPT)
