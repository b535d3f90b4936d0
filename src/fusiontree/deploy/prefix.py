"""States at the end of token sequences already read, so that what comes next need not read them again.

A snapshot holds the constant part of the state (convolution, scan, windows) and the global keys of the tokens since the
snapshot that it continues. So all snapshots of one text together hold its global keys once.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fusiontree.atomic import atomic_write
from fusiontree.deploy.quantized import stored_tensors
from fusiontree.errors import InputError, first_line
from fusiontree.models import HybridCache, HybridLanguageModel

_FORMAT = "fusiontree-conversation-1"
_SAMPLED_ELEMENTS = 64


class Snapshot:
    """The state after `tokens` tokens; see `PrefixStore`.

    Attributes:
        tokens: how many were read.
        logits: [V] of the token that comes next; None where nobody has computed them.
    """

    def __init__(self, key: tuple[int, bytes], state: HybridCache, parent: Snapshot | None) -> None:
        self.key = key
        self.tokens = key[0]
        self.parent = parent
        self.children = 0
        self.logits: torch.Tensor | None = None
        start = parent.tokens if parent else 0
        self.layers = [
            {
                name: (tensor[:, :, start : self.tokens] if name.startswith("global") else tensor).clone()
                for name, tensor in layer.tensors().items()
            }
            for layer in state.layers
        ]

    @property
    def nbytes(self) -> int:
        tensors = [tensor for layer in self.layers for tensor in layer.values()]
        tensors += [] if self.logits is None else [self.logits]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def path(self) -> list[Snapshot]:
        """What it continues, from the first to itself."""
        return [*(self.parent.path() if self.parent else []), self]


@dataclass
class PrefixCounts:
    """What a `PrefixStore` has done: hits and misses of `find`, tokens that needed no reading, evictions."""

    hits: int = 0
    misses: int = 0
    tokens: int = 0
    evictions: int = 0


class PrefixStore:
    """Snapshots by the tokens that they have read, the least recently used ones dropped to stay within a budget.

    One that others continue is kept as long as they are.

    Args:
        model: whose states they are.
        budget: bytes; 0 keeps nothing.
    """

    def __init__(self, model: HybridLanguageModel, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.counts = PrefixCounts()
        self._model = model
        # By use, the latest last; what is continued stands behind what continues it, so the first can always go.
        self._snapshots: OrderedDict[tuple[int, bytes], Snapshot] = OrderedDict()
        self._lengths: dict[int, int] = {}  # number of snapshots of each length

    def __len__(self) -> int:
        return len(self._snapshots)

    def find(self, tokens: Sequence[int]) -> Snapshot | None:
        """The snapshot of the longest prefix of `tokens`; one of all of them only if it has logits."""
        found = None
        for key in _keys(tokens, [length for length in sorted(self._lengths) if length <= len(tokens)]):
            snapshot = self._snapshots.get(key)
            if snapshot is not None and (snapshot.tokens < len(tokens) or snapshot.logits is not None):
                found = snapshot
        if found is None:
            self.counts.misses += 1
        else:
            self.counts.hits += 1
            self.counts.tokens += found.tokens
            self._touch(found)
        return found

    def add(
        self,
        tokens: Sequence[int],
        state: HybridCache,
        *,
        after: Snapshot | None = None,
        logits: torch.Tensor | None = None,
    ) -> Snapshot | None:
        """Keep a copy of the state after `tokens`; None when there is no room for it.

        Args:
            state: of one row, without padding.
            after: a snapshot of a prefix of `tokens`, as `find` or `add` gave it.
            logits: [V] of the next token.
        """
        if not self.budget:
            return None
        (key,) = _keys(tokens, [len(tokens)])
        snapshot = self._snapshots.get(key)
        if snapshot is None:
            while after is not None and self._snapshots.get(after.key) is not after:
                after = after.parent  # dropped in the meantime; what it continues may still be there
            snapshot = Snapshot(key, state, after)
            if after is not None:
                after.children += 1
            self._snapshots[key] = snapshot
            self._lengths[snapshot.tokens] = self._lengths.get(snapshot.tokens, 0) + 1
            self.nbytes += snapshot.nbytes
        if logits is not None and snapshot.logits is None:
            before = snapshot.nbytes
            snapshot.logits = logits.clone()
            self.nbytes += snapshot.nbytes - before
        self._touch(snapshot)
        while self.nbytes > self.budget:
            self._drop(next(iter(self._snapshots.values())))
        return snapshot if snapshot.key in self._snapshots else None

    def restore(self, snapshot: Snapshot, capacity: int) -> HybridCache:
        """The state of `snapshot`, to be written to, with room for `capacity` tokens."""
        state, path = HybridCache(self._model.config), snapshot.path()
        for index, layer in enumerate(state.layers):
            for name, tensor in snapshot.layers[index].items():
                if name.startswith("global"):
                    buffer = tensor.new_zeros(*tensor.shape[:2], capacity + 1, tensor.shape[3])
                    keys = torch.cat([part.layers[index][name] for part in path], dim=2)
                    buffer[:, :, : snapshot.tokens] = keys
                    setattr(layer, name, buffer)
                else:
                    setattr(layer, name, tensor.clone())
        state.set_lengths([snapshot.tokens])
        return state

    def _touch(self, snapshot: Snapshot) -> None:
        for part in reversed(snapshot.path()):
            self._snapshots.move_to_end(part.key)

    def _drop(self, snapshot: Snapshot) -> None:
        assert not snapshot.children
        del self._snapshots[snapshot.key]
        self._lengths[snapshot.tokens] -= 1
        if not self._lengths[snapshot.tokens]:
            del self._lengths[snapshot.tokens]
        self.nbytes -= snapshot.nbytes
        self.counts.evictions += 1
        if snapshot.parent is not None:
            snapshot.parent.children -= 1


def _keys(tokens: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """What prefixes of these lengths are found by; lengths grow."""
    ids, digest, begin = np.asarray(tokens, dtype=np.int64), hashlib.blake2b(digest_size=16), 0
    for length in lengths:
        digest.update(ids[begin:length].tobytes())
        begin = length
        yield length, digest.copy().digest()


def model_fingerprint(model: HybridLanguageModel) -> str:
    """Hexadecimal digest of the weights, by a sample of each: another checkpoint has another one."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        for part in stored_tensors(parameter):
            flat = part.flatten()
            sample = flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)][:_SAMPLED_ELEMENTS]
            digest.update(f"{name} {list(part.shape)} {part.dtype}".encode())
            digest.update(sample.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def save_conversation(
    path: str | Path, model: HybridLanguageModel, tokens: Sequence[int], state: HybridCache, text: str = ""
) -> None:
    """Writes the state after `tokens` to one safetensors file, whole or not at all.

    Args:
        path: of the file.
        model: whose state it is.
        tokens: what was read.
        state: of one row.
        text: anything to find again beside it.
    """
    tensors, metadata = state.to_tensors()
    tensors["tokens"] = torch.tensor(tokens, dtype=torch.int64)
    metadata |= {"conversation": _FORMAT, "model": model_fingerprint(model), "text": text}
    atomic_write(path, save({name: tensor.cpu() for name, tensor in tensors.items()}, metadata=metadata))


def load_conversation(path: str | Path, model: HybridLanguageModel) -> tuple[list[int], HybridCache, str]:
    """The tokens, the state and the text that `save_conversation` has written.

    Raises:
        InputError: the file is missing, damaged, no such file, or of another model.
    """
    try:
        with safe_open(str(path), framework="pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("conversation") != _FORMAT:
                raise InputError(f"{path} is not a conversation saved by this version of fusiontree")
            if metadata["model"] != model_fingerprint(model):
                raise InputError(f"{path} was saved with another model, whose state means nothing to this one")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise InputError(f"conversation file {path} does not exist") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"the conversation {path} cannot be read: {first_line(error)}") from error
    tokens = tensors.pop("tokens").tolist()
    return tokens, HybridCache.from_tensors(tensors, metadata), metadata["text"]
