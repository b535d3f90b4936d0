"""Linear maps of a cut layer multiplied out, in float64, where no one else reads what lies between them.

In a layer of one branch whose gate is gone, z is read by the small MLP alone, and the branch's output h by two linear
maps: alignment and fusion projection. Multiplied out, z and h are never computed (`MergedMaps`). Where the MLP reads
the residual stream there is no z then, and the fusion projection alone reads h.

Shapes: H hidden, d width of what the branch's output projection reads.
"""

from __future__ import annotations

import torch

from fusiontree.deploy.cuts import Tensors
from fusiontree.models import HybridLanguageModelConfig


def merge_of(config: HybridLanguageModelConfig, layer: int) -> str:
    """What of a layer can be merged without adding parameters, as `layer_merges` has it.

    Where the MLP reads the residual stream, both: nobody but the fusion projection reads h. Where it reads z, z always:
    its maps have as many parameters apart as multiplied out, fewer without the alignment's hidden layer.
    h only where the branch is narrow: d <= 4/3 H with that layer, 3/2 H without.
    """
    branch = config.branch(layer)
    if branch not in ("mamba", "attention") or config.has_gate(layer):
        return "none"
    if config.mlp == "residual":
        return "hz"
    hidden = config.hidden_size
    width, rows = config.branch_width(layer), (4 if config.use_alignment else 3) * hidden
    return "hz" if width * rows <= width * hidden + hidden * rows else "z"


def merge_maps(branch: str, merges: str, layer: Tensors) -> Tensors:
    """A layer's float64 tensors with its maps merged.

    Args:
        branch: the one that it has.
        merges: "z" or "hz".
        layer: by name as in the block; not changed.
    """
    if "small_mlp.in_proj.weight" in layer:
        first, (weight, bias, merged) = "merged.in_proj", _with_small_mlp(layer)
    else:
        first, (weight, bias), merged = "fusion_proj", _map(layer, "fusion_proj"), {}
    gone = ["alignment.", "fusion_proj.", "small_mlp."]
    if merges == "hz":
        output, output_b = _map(layer, f"{branch}.out_proj")
        weight, bias = weight @ output, bias + weight @ output_b
        gone.append(f"{branch}.out_proj.")
    merged |= {f"{first}.weight": weight, f"{first}.bias": bias}
    return {name: value for name, value in layer.items() if not name.startswith(tuple(gone))} | merged


def _with_small_mlp(layer: Tensors) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Weight and bias of all that reads h up to each SiLU, and the tensors of the maps behind these."""
    hidden = len(layer["ln_output.weight"])
    first_WH, first_b = _map(layer, "small_mlp.in_proj")
    shortcut, inner = (part.split([hidden, len(part) - hidden]) for part in _map(layer, "alignment.in_proj"))
    (shortcut_HH, inner_HH), (shortcut_b, inner_b) = shortcut, inner
    fusion, fusion_b = _map(layer, "fusion_proj")
    bias = first_WH @ shortcut_b + first_b
    behind = {f"merged.out_proj.{name}": layer[f"small_mlp.out_proj.{name}"] for name in ("weight", "bias")}
    if "alignment.out_proj.weight" in layer:
        second, second_b = _map(layer, "alignment.out_proj")
        behind["merged.align_proj.weight"] = first_WH @ second
        bias = bias + first_WH @ second_b
    return torch.cat((fusion, first_WH @ shortcut_HH, inner_HH)), torch.cat((fusion_b, bias, inner_b)), behind


def _map(layer: Tensors, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer[f"{name}.weight"], layer[f"{name}.bias"]
