"""Training: settings, the one loop, losses, gate monitor, checkpoints, token-loss evaluation.

The package can be called: `fusiontree.train(config)` trains (see `train`), while `fusiontree.train.engine` and its
neighbours stay importable, whichever of the two a program touches first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusiontree.train.engine import TrainResult
    from fusiontree.train.settings import RunSettings

__all__ = ["train"]


def train(
    config: RunSettings | Mapping[str, Any] | str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    resume: str | None = None,
) -> TrainResult:
    """Train a model.

    Args:
        config: path of a YAML file, a mapping of its sections, or `RunSettings`.
        overrides: `"section.key=value"`, applied to a file or a mapping.
        resume: None = a new run; "auto" = go on from the run's newest checkpoint, if it has one; or the path of a
            checkpoint or run.

    Raises:
        InputError: settings, data or a checkpoint that cannot be used; a loss that is not finite; a full disk.
    """
    # torch, transformers and accelerate take seconds to import; settings alone need none of them.
    from fusiontree.train.engine import TrainingEngine
    from fusiontree.train.settings import as_run_settings, placing_mistakes

    with placing_mistakes(config, overrides):
        engine = TrainingEngine(as_run_settings(config, overrides), resume=resume)
    return engine.run()


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> TrainResult:
        return train(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
