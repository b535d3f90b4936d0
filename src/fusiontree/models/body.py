"""The part of a model that other libraries call `base_model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fusiontree.errors import InputError

if TYPE_CHECKING:
    from fusiontree.models.hybrid_model import BackboneOutput, HybridLanguageModel


class Body:
    """A model without its head, for libraries that call `base_model` and bring a head or a loss of their own.

    Calling it is `HybridLanguageModel.backbone`, with those arguments of `forward` beside that callers of other models
    give; whatever else is asked of it, the model answers. It is no module: the blocks are the model's own.
    """

    def __init__(self, model: HybridLanguageModel) -> None:
        self._model = model

    def __call__(
        self,
        *args: Any,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        check_foreign(kwargs.get("position_ids"), output_attentions, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        output = self._model.backbone(*args, **kwargs)
        if return_dict is not False:
            return output
        found = (output.last_hidden_state, output.past_key_values, output.hidden_states)
        return tuple(value for value in found if value is not None)

    def __getattr__(self, name: str) -> Any:
        if name == "_model" or name.startswith("__"):  # while it is copied
            raise AttributeError(name)
        return getattr(self._model, name)

    def get_decoder(self) -> Body:
        return self

    def get_encoder(self, modality: str | None = None) -> Body:
        return self


def check_foreign(
    position_ids: torch.Tensor | None, output_attentions: bool | None, *boundaries: torch.Tensor | None
) -> None:
    """Arguments that are taken for callers written for other models.

    Raises:
        InputError: attention weights are asked for, or `boundaries` mark documents that `position_ids` do not.
    """
    if output_attentions:
        raise InputError("`output_attentions` cannot be had: no attention weights are ever held")
    if position_ids is None and any(given is not None for given in boundaries):
        raise InputError(
            "`cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx` mark no documents here: give `position_ids`, which are 0 "
            "where a document starts"
        )
