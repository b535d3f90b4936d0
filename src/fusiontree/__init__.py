"""FusionTree: hybrid Mamba + attention language models with a learned gate.

`import fusiontree` registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` and every tool
built on it load our checkpoints. Registering needs the model's class, hence torch and transformers, which is most of
what this import costs. The command line alone skips it, to answer `fusiontree --help` at once: each command imports
`fusiontree.models`, which registers, as soon as it touches a model. Everything else is imported when first used.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from fusiontree.version import __version__

if TYPE_CHECKING:
    from fusiontree.deploy.loading import load
    from fusiontree.deploy.runtime import generate
    from fusiontree.errors import InputError
    from fusiontree.models import HybridCache, HybridLanguageModel, HybridLanguageModelConfig
    from fusiontree.train import train

__all__ = [
    "HybridCache",
    "HybridLanguageModel",
    "HybridLanguageModelConfig",
    "InputError",
    "__version__",
    "generate",
    "load",
    "train",
]

# Where DeepSpeed is installed, accelerate imports it, and it would say on every command's standard output that there is
# no GPU.
logging.getLogger("DeepSpeed").addFilter(lambda record: not str(record.msg).startswith("Setting accelerator to CPU"))
# Where torchao is installed, transformers imports it, and it would say on every command's standard error which of its
# kernels are not for this machine, and that torch has a new way to register its constants.
logging.getLogger("torchao").addFilter(lambda record: not str(record.msg).startswith("Failed to load"))
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "is an Enum subclass" not in str(record.msg))

_HOMES = {
    "HybridCache": "fusiontree.models",
    "HybridLanguageModel": "fusiontree.models",
    "HybridLanguageModelConfig": "fusiontree.models",
    "InputError": "fusiontree.errors",
    "generate": "fusiontree.deploy.runtime",
    "load": "fusiontree.deploy.loading",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        # The package itself: it can be called, so that `fusiontree.train(config)` and `fusiontree.train.engine` agree.
        return importlib.import_module("fusiontree.train")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_command_line() -> bool:
    """Whether this process is the console script `fusiontree` or `python -m fusiontree`.

    While `-m` looks for its module, which is when this package is imported, `sys.argv[0]` is `-m`. A process that is
    not recognised only starts slower.
    """
    return bool(sys.argv) and os.path.basename(sys.argv[0]) in ("-m", "fusiontree", "fusiontree.exe")


if not _is_command_line():
    importlib.import_module("fusiontree.models")
