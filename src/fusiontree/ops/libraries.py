"""Whether an optional library of GPU kernels, of which only some versions will do, can be used here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib import metadata

import torch
from packaging.version import Version


def versioned_unusable(
    package: str, oldest: Version, load: Callable[[], object], *, without_version: str
) -> str | None:
    """Why the library cannot be used on this machine (None: it can).

    Args:
        package: its name on the index; its module is called the same, with underscores.
        oldest: the first version that will do.
        load: imports what is needed of it.
        without_version: the reason where the module can be imported but no such package is installed.
    """
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return f"the package {package} is not installed"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return without_version
    if Version(version) < oldest:
        return f"{package} {version} is installed, {oldest} or newer is needed"
    try:
        load()
    except Exception as error:  # one for another torch, CUDA, triton or transformers fails in many ways
        return f"{package} {version} is installed but cannot be imported: {error}"
    return None
