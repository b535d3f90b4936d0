"""What `generate` of transformers asks a model for, where its state is a `HybridCache`.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from fusiontree.errors import InputError
from fusiontree.models.cache import HybridCache

# Tokens that `generate` makes room for at once; longer sequences grow the buffers by doubling.
_MAX_PREALLOCATION = 8192


class HybridGenerationMixin(GenerationMixin):
    """`generate` with a `HybridCache` alone, and with rows that are padded on either side.

    (By the end of its name transformers knows that a model generates.)
    """

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        cache = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"`cache_implementation={generation_config.cache_implementation!r}` does not fit a recurrent state: "
                "leave it out, HybridCache is used"
            )
        if cache is not None:
            if not isinstance(cache, HybridCache):
                raise InputError(f"`past_key_values` must be a HybridCache, got {type(cache).__name__}")
            cache._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HybridCache(
                self.config, capacity=min(max_cache_length, _MAX_PREALLOCATION)
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: HybridCache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,  # transformers looks for this name in the signature
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict:
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        piece = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if attention_mask is None:
            return inputs
        if past_key_values is not None and piece.shape[1] == 1 and not is_first_iteration:
            # A token that was just chosen is real, and the state knows what came before it.
            inputs["attention_mask"] = None
        elif inputs.get("logits_to_keep") == 1 and not attention_mask[:, -1].all():
            mask = attention_mask[:, -piece.shape[1] :].bool()
            inputs["logits_to_keep"] = _last_real_columns(mask, past_key_values)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> None:
        """None: `forward` counts positions from the mask and the state, also where rows are padded on the right."""
        return None


def _last_real_columns(mask: torch.Tensor, cache: HybridCache | None) -> torch.Tensor:
    """[B, 1]: the column of each row's last real token in a piece with mask [B, T]; 0 for rows that have yet to begin.

    Raises:
        InputError: a row's last real token was read in an earlier piece, whose logits are gone.
    """
    if cache is not None and cache.read is not None and (~mask.any(1) & (cache.read > 0)).any():
        raise InputError(
            "a prompt ends in an earlier piece than the longest one: pad prompts on the left to read them in pieces "
            "(`prefill_chunk_size`)"
        )
    index = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, index, 0).amax(1, keepdim=True)
