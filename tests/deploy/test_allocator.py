"""Memory that a server's states leave behind."""

import os
import platform
import subprocess
import sys

import pytest

# Buffers that come and go between small ones that stay, as states between snapshots.
_PROGRAM = """
import torch
from fusiontree.deploy.allocator import keep_large_blocks_apart

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

keep_large_blocks_apart()
torch.ones(7 * 2**20)  # 28 MiB, gone at once: what glibc takes as its threshold from now on
before, kept = resident(), []
for size in (5, 6, 7, 8, 9, 10):
    buffers = []
    for _ in range(6):
        buffers.append(torch.ones(size * 2**18))
        kept.append(torch.ones(2**18))
    del buffers
print((resident() - before) // 2**20)
"""


def _left_behind(**variables: str) -> int:
    """MiB more than before, after buffers of up to 60 MiB have gone; 36 of them are in use."""
    command = [sys.executable, "-c", _PROGRAM]
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(command, env=plain | variables, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_buffers_of_states_leave_no_holes_unless_variables_of_glibc_say_otherwise() -> None:
    assert _left_behind() <= 45
    assert _left_behind(MALLOC_MMAP_THRESHOLD_="33554432") >= 80
