"""Using a trained model: loading it, generating text with it, cutting it smaller.

`export` and `reference_parent` are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusiontree.deploy.export_pruned import export
    from fusiontree.deploy.reference import reference_parent

__all__ = ["export", "reference_parent"]

_HOMES = {"export": "fusiontree.deploy.export_pruned", "reference_parent": "fusiontree.deploy.reference"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
