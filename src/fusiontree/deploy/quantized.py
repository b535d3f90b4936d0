"""Weights in 8 or 4 bits, through torchao: smaller, and where the device has the products for it, faster.

Of the weights alone: what the layers compute with, states and sums stay as they are. Only the linear layers of the
blocks are changed; embeddings and head (often one table), norms, convolutions, `A_log`, `D` and `dt_bias` are not.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusiontree.errors import InputError, first_line
from fusiontree.models import HybridLanguageModel

KINDS = ("int8", "int4")

_GROUP = 32  # inputs that share a scale, in int4
_INT4_OUTPUTS = 16  # what the number of outputs must be a multiple of


@dataclass(frozen=True)
class Quantized:
    """What `quantize_weights` did.

    layers: kind -> number of layers whose weights are of it now; int4 leaves layers whose sizes do not fit in int8.
    bytes_before, bytes_after: of all weights.
    """

    layers: dict[str, int]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        layers = ", ".join(f"{count} in {kind}" for kind, count in self.layers.items() if count)
        return f"linear layers: {layers}; weights: {self.bytes_before:,} -> {self.bytes_after:,} bytes"


def check_quantizable(model: HybridLanguageModel, kind: str) -> None:
    """Raise InputError where weights of that kind are known to be impossible here, before anything is done."""
    if kind not in KINDS:
        raise InputError(f"weights can be {' or '.join(KINDS)}, got {kind!r}")
    if importlib.util.find_spec("torchao") is None:
        raise InputError(f"weights in {kind} need torchao: pip install 'fusiontree[quant]'")
    device = model.device.type
    if device not in ("cpu", "cuda"):
        raise InputError(f"weights in {kind} are for cpu and cuda, the model is on {device}")


def quantize_weights(model: HybridLanguageModel, kind: str) -> Quantized:
    """Rounds the weights of the blocks' linear layers, in place. The model cannot be trained or saved then.

    int8 has a scale for each output, int4 a scale and an offset for each group of 32 inputs of each output.

    Args:
        model: as `fusiontree.load` returns it.
        kind: "int8" or "int4".

    Raises:
        InputError: another kind; torchao is missing; it cannot do this on the model's device or in its dtype; the model
            decodes as a compiled program.
    """
    check_quantizable(model, kind)
    if kind == "int4" and model.device.type == "cuda" and model.dtype != torch.bfloat16:
        raise InputError(f"weights in int4 on CUDA need dtype bfloat16, the model has {model.dtype}")
    if model.decodes_compiled:
        raise InputError(f"weights in {kind} do not go with compiled steps: choose one of the two")
    before = weight_bytes(model)
    layers = {layer: _kind_for(layer, kind) for layer in model.layers.modules() if isinstance(layer, nn.Linear)}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao's, of its own internals
            for layer, own in layers.items():
                _quantize(layer, own)
            for layer in layers:
                layer(torch.zeros(1, layer.in_features, dtype=model.dtype, device=model.device))
    except Exception as error:  # whatever a kernel or its absence says
        raise InputError(f"weights in {kind} do not work on this device: {first_line(error)}") from error
    counts = {name: list(layers.values()).count(name) for name in KINDS}
    return Quantized(counts, before, weight_bytes(model))


def _kind_for(layer: nn.Linear, kind: str) -> str:
    fits = layer.in_features % _GROUP == 0 and layer.out_features % _INT4_OUTPUTS == 0
    return kind if fits else "int8"


def _quantize(layer: nn.Linear, kind: str) -> None:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    config: Any
    if kind == "int8":
        config = Int8WeightOnlyConfig(set_inductor_config=False)
    elif layer.weight.device.type == "cuda":
        config = Int4WeightOnlyConfig(
            group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        config = PrototypeInt4WeightOnlyConfig(group_size=_GROUP, set_inductor_config=False)
    quantize_(layer, config, filter_fn=lambda module, name: module is layer)


def stored_tensors(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a parameter is made of: itself, or what its quantised form holds."""
    tensor = parameter.detach()
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from stored_tensors(getattr(tensor, name))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, as they are stored."""
    return sum(
        part.numel() * part.element_size() for parameter in model.parameters() for part in stored_tensors(parameter)
    )
