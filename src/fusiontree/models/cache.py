"""The recurrent state of a hybrid model: everything that tokens already read have left behind.

Shapes: B batch, T tokens of a piece, W window, S capacity of the growing buffer, D attention head width,
K convolution taps, c convolution channels. One slot beyond W and S takes what must not be kept (padding, tokens of
documents that ended), so that writing needs no data-dependent shapes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Cache

from fusiontree.errors import InputError
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.layout import Layout

_FORMAT = "fusiontree-cache-1"
_MINIMUM_CAPACITY, _UNBOUNDED = 64, 2**31 - 1
_ROW_COUNTS = ("lengths", "next_position", "read")


def cache_geometry(config: HybridLanguageModelConfig) -> list[dict[str, int]]:
    """Per layer, the sizes of its state; a part the layer does not have is absent."""
    layers = []
    for index in range(config.num_layers):
        sizes: dict[str, int] = {}
        branch, heads = config.branch(index), config.heads(index)
        if branch in ("both", "mamba"):
            if config.mamba_version == 2:
                inner = heads.mamba * config.mamba_head_dim
                sizes |= {"conv": inner + 2 * config.mamba_state_size, "taps": config.conv_kernel - 1}
                sizes |= {"scan_heads": heads.mamba, "scan_width": config.mamba_head_dim}
            else:
                inner = config.mamba_inner_size
                sizes |= {"conv": inner, "taps": config.conv_kernel - 1, "scan_heads": inner, "scan_width": 0}
            sizes["scan_state"] = config.mamba_state_size
        if branch in ("both", "attention"):
            sizes |= {"head_dim": config.head_dim, "window": config.layer_window(index)}
            sizes["global_kv_heads"] = heads.global_keys
            sizes["local_kv_heads"] = heads.keys - heads.global_keys
        layers.append(sizes)
    return layers


class HybridLayerState:
    """State of one layer: convolution tail [B,K-1,c], scan state, ring of local keys and values [B,heads,W+1,D],
    growing buffer of global ones [B,heads,S+1,D]. Tensors are None until the first token.

    A head's keys lie one after the other: a step of decoding reads them all, and strides would slow that down.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    names = ("conv", "scan", "local_keys", "local_values", "global_keys", "global_values")

    def __init__(self, geometry: dict[str, int], capacity: int = 0):
        self.geometry = geometry
        self.capacity = capacity
        # Tensors once `ensure_mamba` and `ensure_attention` have allocated them.
        self.conv: Any = None
        self.scan: Any = None
        self.local_keys: Any = None
        self.local_values: Any = None
        self.global_keys: Any = None
        self.global_values: Any = None

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name in self.names if (value := getattr(self, name)) is not None}

    @property
    def is_initialized(self) -> bool:
        return bool(self.tensors())

    def ensure_mamba(self, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the empty convolution tail (in `dtype`) and scan state (float32, or float64 beside float64)."""
        g = self.geometry
        if self.conv is None:
            state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
            width = (g["scan_width"],) if g["scan_width"] else ()
            self.conv = torch.zeros(batch, g["taps"], g["conv"], dtype=dtype, device=device)
            self.scan = torch.zeros(batch, g["scan_heads"], *width, g["scan_state"], dtype=state_dtype, device=device)

    def ensure_attention(self, batch: int, length: int, like: torch.Tensor) -> None:
        """Allocate the ring, and room for `length` tokens in the growing buffer (doubling, so growth is amortised)."""
        g = self.geometry
        if self.local_keys is None and g["local_kv_heads"]:
            shape = (batch, g["local_kv_heads"], g["window"] + 1, g["head_dim"])
            self.local_keys, self.local_values = like.new_zeros(shape), like.new_zeros(shape)
        if not g["global_kv_heads"]:
            return
        held = 0 if self.global_keys is None else self.global_keys.shape[2] - 1
        if self.global_keys is None or held < length:
            room = max(length, 2 * held, self.capacity, _MINIMUM_CAPACITY)
            for name in ("global_keys", "global_values"):
                grown = like.new_zeros(batch, g["global_kv_heads"], room + 1, g["head_dim"])
                if held:
                    grown[:, :, :held] = getattr(self, name)[:, :, :held]
                setattr(self, name, grown)


def ring_index(lengths: torch.Tensor, window: int, slots: int | None = None) -> torch.Tensor:
    """[B, slots]: the place in the document of the token in each of the first ring slots (default: in each of all)
    after `lengths` [B] tokens; -1 if empty."""
    slot = torch.arange(window if slots is None else slots, device=lengths.device)
    newest = lengths[:, None] - 1
    place = newest - (newest - slot) % window
    return torch.where(place >= 0, place, -1)


class HybridCache(Cache):
    """State of a batch of sequences, updated in place by `HybridLanguageModel.forward` and returned by it.

    Args:
        config: the model's configuration.
        capacity: tokens to make room for at once in the growing buffers (they grow by themselves past it).

    Attributes:
        layers: one `HybridLayerState` per block.
        lengths: [B] tokens of each row's current document; None before the first token.
        next_position: [B] the position of each row's next token.
        read: [B] real tokens read so far, of all the row's documents.
        seen: columns read so far, padding included (`get_seq_length`).
        max_length: upper bound of `lengths`.
        max_position: upper bound of `next_position`.
        even: every entry of `lengths` is `max_length`, and of `next_position` `max_position`. So it is until a row has
            been padded or packed; what a token sees is then known without a look at any tensor.
    """

    layers: list[HybridLayerState]

    def __init__(self, config: HybridLanguageModelConfig, capacity: int = 0):
        self._setup(cache_geometry(config), capacity)

    def _setup(self, geometry: list[dict[str, int]], capacity: int) -> None:
        super().__init__(layers=[HybridLayerState(sizes, capacity) for sizes in geometry])
        self.geometry = geometry
        self.lengths: torch.Tensor | None = None
        self.next_position: torch.Tensor | None = None
        self.read: torch.Tensor | None = None
        self.seen = self.max_length = self.max_position = 0
        self.even = True

    def advance(self, layout: Layout, tokens: int) -> None:
        """Record that every layer has read the piece that `layout` describes."""
        self.lengths, self.next_position, self.read = layout.lengths, layout.next_position, layout.read
        self.seen += tokens
        self.max_length = layout.max_length
        self.max_position = max(self.max_position, layout.max_position + 1)
        self.even = layout.even

    def check(self, geometry: list[dict[str, int]], batch: int) -> None:
        """Raise InputError unless this state belongs to a model of this geometry and to `batch` rows."""
        if self.geometry != geometry:
            raise InputError(
                "the cache belongs to a model of another geometry: build it with HybridCache(model.config)"
            )
        if self.lengths is not None and len(self.lengths) != batch:
            raise InputError(f"the cache holds {len(self.lengths)} rows, but the input has {batch}")

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else len(self.lengths)

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.lengths is not None

    @property
    def is_croppable(self) -> bool:
        return False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise InputError("HybridCache is updated by HybridLanguageModel alone; other models cannot write to it")

    def crop(self, tokens_to_remove: int) -> None:
        raise InputError("recurrent state cannot be cropped: take a `snapshot()` before and `rollback()` to it")

    def reset(self) -> None:
        """Forget everything, as if new: the next input may have another number of rows."""
        self._setup(self.geometry, self.layers[0].capacity)

    # Rows: beams, forks, batches that shrink and grow.

    @property
    def capacity(self) -> int:
        """Tokens per row that the allocated buffers hold without growing."""
        held = [layer.global_keys.shape[2] - 1 for layer in self.layers if layer.global_keys is not None]
        return held[0] if held else _UNBOUNDED

    def tensors(self) -> list[torch.Tensor]:
        """The state's tensors themselves, layer by layer."""
        return [tensor for layer in self.layers for tensor in layer.tensors().values()]

    def _map_rows(self, function: Any) -> None:
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                setattr(layer, name, function(tensor))
        for name in _ROW_COUNTS:
            if (counts := getattr(self, name)) is not None:
                setattr(self, name, function(counts))

    def _mapped(self, function: Any) -> HybridCache:
        other = copy.copy(self)
        other.layers = list(map(copy.copy, self.layers))
        other._map_rows(function)
        return other

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was, in place; beam_idx [B]."""
        for tensor in self.tensors():
            tensor.copy_(tensor.index_select(0, beam_idx.to(tensor.device)))
        for name in _ROW_COUNTS:
            if (counts := getattr(self, name)) is not None:
                setattr(self, name, counts[beam_idx.to(counts.device)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows that `indices` names (integers, repetitions allowed, or a bool mask [B])."""
        self._map_rows(lambda tensor: tensor[indices.to(tensor.device)].contiguous())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times: rows 0,0,…,1,1,…"""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    # Slots: rows that come and go in a batch of fixed buffers.

    def resize(self, rows: int, capacity: int) -> None:
        """Give the buffers room for so many rows, and tokens of each; the first ones keep what they hold.

        Counts per row stay as they are: `view_rows` sets them."""
        for layer in self.layers:
            for name, tensor in layer.tensors().items():
                grows = name.startswith("global")
                shape = (*tensor.shape[1:2], capacity + 1, *tensor.shape[3:]) if grows else tensor.shape[1:]
                resized = tensor.new_zeros(rows, *shape)
                kept = min(rows, len(tensor))
                if grows:
                    slots = min(capacity + 1, tensor.shape[2]) - 1
                    resized[:kept, :, :slots] = tensor[:kept, :, :slots]
                else:
                    resized[:kept] = tensor[:kept]
                setattr(layer, name, resized)  # one after the other, so that little is held twice

    def copy_row(self, row: int, source: HybridCache, source_row: int, tokens: int) -> None:
        """Buffers of `row` become those of a row of `source` that holds `tokens` tokens, for which both have room."""
        for mine, theirs in zip(self.layers, source.layers, strict=True):
            for name, tensor in theirs.tensors().items():
                target = getattr(mine, name)
                if name.startswith("global"):
                    target[row, :, :tokens] = tensor[source_row, :, :tokens]
                else:
                    target[row] = tensor[source_row]

    def view_rows(self, lengths: Sequence[int], first: int = 0) -> HybridCache:
        """A state of the rows from `first` on in the same memory, of one document each without padding, so many tokens
        long."""
        view = self._mapped(lambda tensor: tensor[first : first + len(lengths)])
        view.set_lengths(lengths)
        return view

    def take_row(self, row: int, tokens: int) -> HybridCache:
        """A copy of `row` as a state of its own: one document without padding, `tokens` tokens long."""
        return self.view_rows([tokens], row).snapshot()

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Rows hold one document each without padding, so many tokens long."""
        device = next(iter(self.tensors())).device
        self.lengths = self.next_position = self.read = torch.tensor(lengths, device=device)
        self.seen = self.max_length = self.max_position = max(lengths)
        self.even = min(lengths) == self.max_length

    # Copies, points to return to, files.

    @property
    def nbytes(self) -> int:
        """Bytes of all allocated state tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def clone(self) -> HybridCache:
        """An independent copy."""
        return self._mapped(torch.clone)

    def snapshot(self) -> HybridCache:
        """A point to return to with `rollback`; holds a copy of the state, trimmed to the tokens in use."""
        view = self._mapped(lambda tensor: tensor)
        for layer in view.layers:
            for name in ("global_keys", "global_values"):
                if (tensor := getattr(layer, name)) is not None:
                    setattr(layer, name, tensor[:, :, : self.max_length + 1])
        return view.clone()

    def rollback(self, snapshot: HybridCache) -> None:
        """Return to `snapshot`, which stays valid."""
        if snapshot.geometry != self.geometry:
            raise InputError("the snapshot belongs to a model of another geometry")
        copied = snapshot.clone()
        for name in ("layers", *_ROW_COUNTS, "seen", "max_length", "max_position", "even"):
            setattr(self, name, getattr(copied, name))

    def state(self) -> dict[str, torch.Tensor]:
        """All that later tokens can read, by name, in canonical form: keys and values [B,slots,heads,D], where slots
        that hold nothing visible are zero and the growing buffers end at the longest row. Two caches that behave alike
        have equal `state()`."""
        if self.lengths is None or self.next_position is None:
            return {}
        result = {"lengths": self.lengths.clone(), "next_position": self.next_position.clone()}
        longest = int(self.lengths.max())
        for index, layer in enumerate(self.layers):
            for name, tensor in layer.tensors().items():
                if name.startswith("local"):
                    visible = ring_index(self.lengths, layer.geometry["window"]) >= 0
                elif name.startswith("global"):
                    visible = torch.arange(longest, device=self.lengths.device) < self.lengths[:, None]
                else:
                    result[f"layers.{index}.{name}"] = tensor.clone()
                    continue
                kept = tensor[:, :, : visible.shape[1]].transpose(1, 2)
                result[f"layers.{index}.{name}"] = kept.masked_fill(~visible[..., None, None], 0).contiguous()
        return result

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, its geometry in the metadata."""
        tensors, metadata = self.to_tensors()
        save_file(tensors, str(path), metadata=metadata)

    def to_tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save` writes: tensors by name, and the metadata without which they mean nothing."""
        metadata = {"format": _FORMAT, "geometry": json.dumps(self.geometry), "seen": str(self.seen)}
        counts = {} if self.read is None else {"read": self.read}
        return self.state() | counts, metadata

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> HybridCache:
        """Read a state written by `save`.

        Raises:
            InputError: the file is missing, damaged or not a FusionTree cache.
        """
        try:
            with safe_open(str(path), framework="pt", device=str(device or "cpu")) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise InputError(f"{path} is not a cache saved by this version of fusiontree")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read the cache {path}: {error}") from error
        return cls.from_tensors(tensors, metadata)

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> HybridCache:
        """The state of which `to_tensors` gave these."""
        tensors = dict(tensors)
        cache = cls.__new__(cls)
        cache._setup(json.loads(metadata["geometry"]), 0)
        cache.seen = int(metadata["seen"])
        if not tensors:
            return cache
        cache.lengths, cache.next_position, cache.read = (tensors.pop(name) for name in _ROW_COUNTS)
        cache.max_length, cache.max_position = int(cache.lengths.max()), int(cache.next_position.max())
        cache.even = bool((cache.lengths == cache.max_length).all() & (cache.next_position == cache.max_position).all())
        for name, tensor in tensors.items():
            _, index, part = name.split(".")
            if part.startswith(("local", "global")):
                if not tensor.shape[1]:
                    continue
                # One slot more, that takes what is not kept.
                tensor = torch.cat((tensor, torch.zeros_like(tensor[:, :1])), dim=1).transpose(1, 2).contiguous()
            setattr(cache.layers[int(index)], part, tensor)
        return cache
