"""The part of a model that other libraries call `base_model`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusiontree.models.hybrid_model import BackboneOutput, HybridLanguageModel


class Body:
    """A model without its head, for libraries that call `base_model` and bring a head or a loss of their own.

    Calling it is `HybridLanguageModel.backbone`; whatever else is asked of it, the model answers. It is no module: the
    blocks are the model's own.
    """

    def __init__(self, model: HybridLanguageModel) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> BackboneOutput:
        return self._model.backbone(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_model" or name.startswith("__"):  # while it is copied
            raise AttributeError(name)
        return getattr(self._model, name)

    def get_decoder(self) -> Body:
        return self

    def get_encoder(self, modality: str | None = None) -> Body:
        return self
