"""The hybrid language model and its state."""

from transformers import AutoConfig, AutoModelForCausalLM

from fusiontree.models.cache import HybridCache
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.hybrid_block import AlignmentMLP, GateLowRank, HybridBlock
from fusiontree.models.hybrid_model import HybridLanguageModel, HybridOutput
from fusiontree.models.layout import SRTE
from fusiontree.models.local_global_attn import LocalGlobalAttention
from fusiontree.models.mamba_block import MambaBlock

AutoConfig.register("fusiontree", HybridLanguageModelConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridLanguageModelConfig, HybridLanguageModel, exist_ok=True)

__all__ = [
    "SRTE",
    "AlignmentMLP",
    "GateLowRank",
    "HybridBlock",
    "HybridCache",
    "HybridLanguageModel",
    "HybridLanguageModelConfig",
    "HybridOutput",
    "LocalGlobalAttention",
    "MambaBlock",
]
