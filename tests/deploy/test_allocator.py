"""Where the C library puts the buffers of a server's states."""

import os
import platform
import subprocess
import sys

import pytest

# The C library itself is asked: the system's count of resident pages also moves with whatever else the process does.
_PROGRAM = """
import ctypes
import torch
from fusiontree.deploy.allocator import keep_large_blocks_apart

class Heap(ctypes.Structure):  # mallinfo2 of glibc's malloc.h; hblks: blocks that lie apart
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Heap
keep_large_blocks_apart()
torch.ones(7 * 2**20)  # 28 MiB, gone at once: by default what glibc takes as its threshold from now on
before, kept, apart = library.mallinfo2().hblks, [], []
for size in (1, 5, 10):
    kept += [torch.ones(size * 2**18) for _ in range(6)]
    apart.append(library.mallinfo2().hblks - before)
kept.clear()
print(*apart, library.mallinfo2().hblks - before)
"""


def _apart(**variables: str) -> list[int]:
    """Blocks outside the heap after six of 1 MiB, six of 5 MiB more, six of 10 MiB more, and when all have gone."""
    command = [sys.executable, "-c", _PROGRAM]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, env=plain | variables, capture_output=True, text=True, check=True, timeout=600)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_buffers_of_states_lie_apart_unless_variables_of_glibc_say_otherwise() -> None:
    small, some, more, none = _apart()
    assert (small, none) == (0, 0)
    assert some >= 2  # one may fit where something else was freed in the heap before
    assert more >= some + 4
    assert _apart(MALLOC_MMAP_THRESHOLD_="33554432") == [0, 0, 0, 0]
