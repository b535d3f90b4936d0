"""Where what can be made again is kept: compiled kernels, indexes of text files, unpacked text."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache_folder() -> Path:
    """`$FUSIONTREE_CACHE`, else `fusiontree` in the user's cache folder. It need not exist."""
    named = os.environ.get("FUSIONTREE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusiontree"
