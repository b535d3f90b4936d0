"""FusionTree: hybrid Mamba + attention language models with a learned gate."""

from fusiontree.version import __version__

__all__ = ["__version__"]
