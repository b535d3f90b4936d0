"""Law 11: loading never executes what it loads."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest_laws import build

from fusiontree import HybridCache, HybridLanguageModel
from fusiontree.errors import InputError


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def test_model_with_pickled_weights(tmp_path):
    build().save_pretrained(tmp_path)
    marker = tmp_path / "executed"
    (tmp_path / "model.safetensors").unlink()
    torch.save({"embed_tokens.weight": Bomb(marker)}, tmp_path / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        HybridLanguageModel.from_pretrained(tmp_path)
    assert not marker.exists()


def test_pickled_cache(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "state.safetensors"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(InputError, match=r"state\.safetensors"):
        HybridCache.load(path)
    assert not marker.exists()


def test_saving_writes_safetensors_alone(tmp_path):
    build().save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}
