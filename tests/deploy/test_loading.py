"""What `load` takes, and the one sentence it answers with when it cannot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusiontree import HybridLanguageModel, InputError, load
from tiny_models import save_tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_comes_back_ready_to_use(tiny_folder: Path) -> None:
    model = load(tiny_folder, device="cpu")
    assert not model.training
    assert model.tokenizer.decode(model.tokenizer("the quick fox")["input_ids"]) == "the quick fox"
    again = HybridLanguageModel.from_pretrained(tiny_folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, again(PROMPT).logits, rtol=0, atol=0)


def test_dtype_is_the_saved_one_or_the_one_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    assert load(tiny_folder, device="cpu").dtype == torch.float32
    narrow = load(tiny_folder, device="cpu", dtype=torch.bfloat16)
    assert narrow.embed_tokens.weight.dtype == torch.bfloat16
    assert narrow.layers[0].mamba.A_log.dtype == torch.float32
    narrow.save_pretrained(tmp_path / "narrow")
    saved = load(tmp_path / "narrow", device="cpu")
    assert saved.embed_tokens.weight.dtype == torch.bfloat16
    assert saved.layers[0].mamba.A_log.dtype == torch.float32
    assert saved.tokenizer is None


def test_a_run_directory_stands_for_its_newest_checkpoint(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, fields in ((1, {}), (2, {"num_layers": 1})):
        save_tiny_model(run / "checkpoints" / f"step_{step:08d}", None, **fields)
    assert load(run, device="cpu").config.num_layers == 1
    (run / "latest").symlink_to("checkpoints/step_00000001")
    assert load(run, device="cpu").config.num_layers == 2
    assert load(run / "latest", device="cpu").config.num_layers == 2


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_and_tied_weights(tmp_path: Path, tied: bool) -> None:
    model = load(save_tiny_model(tmp_path / "one", None, tie_word_embeddings=tied), device="cpu")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    shared = load(tmp_path / "many", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(shared(PROMPT).logits, model(PROMPT).logits, rtol=0, atol=0)
    next((tmp_path / "many").glob("*00002-of*.safetensors")).unlink()
    with pytest.raises(InputError, match=r"00002-of.*safetensors does not exist"):
        load(tmp_path / "many", device="cpu")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"neither a model \(it has no config.json\) nor a run directory"):
        load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file is a file; name the model's folder"):
        load(tmp_path / "file")


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model.safetensors is truncated or not a safetensors file"):
        load(folder)
    weights.write_bytes(b"")
    with pytest.raises(InputError, match=r"model.safetensors is truncated"):
        load(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"model.safetensors does not exist"):
        load(folder)


def test_weights_of_another_shape_than_the_configuration(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"gate_rank": 6}))
    with pytest.raises(InputError, match=r"the tensor layers.0.* has shape \[.*4.*\], but .* asks for \[.*6.*\]"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(InputError, match=r"lack the tensor layers.2.* \(and \d+ more\)"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 1}))
    with pytest.raises(InputError, match=r"holds the tensor layers.1.*, which the model of .* does not have"):
        load(folder)


def test_a_missing_tensor_is_not_made_up(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("layers.1.mamba.dt_bias"))
    with pytest.raises(InputError, match="lack the tensor layers.1.mamba.dt_bias that config.json asks for"):
        load(folder)


def test_a_tensor_left_over_is_not_ignored(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(2)))
    with pytest.raises(InputError, match="holds the tensor extra, which"):
        load(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"must lie beside its config.json as safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"model_type": "fusiontree", "hid', r"config.json is truncated or not JSON"),
        ('{"model_type": "llama"}', r"describes a model of type 'llama', not a FusionTree model"),
        ('{"model_type": "fusiontree", "windw_size": 8}', r"config.json: `windw_size`.*did you mean `window_size`"),
        ('{"model_type": "fusiontree", "num_heads": 5}', r"config.json: `hidden_size` 1536 is not a multiple"),
        ("[]", r"describes a model of type None"),
    ],
)
def test_broken_configuration(folder: Path, content: str, sentence: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=sentence):
        load(folder)


def test_tokenizer_of_another_model(folder: Path, corpus: Path) -> None:
    small = save_tiny_model(folder.parent / "small", corpus / "tokenizer", vocab_size=290)
    with pytest.raises(InputError, match=r"has ids up to 299, but the model's vocab_size is 290"):
        load(small)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be loaded"):
        load(folder)


def test_device_that_is_not_there(folder: Path) -> None:
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(InputError, match=rf"device '{device}' cannot be used here"):
            load(folder, device=device)


def test_every_sentence_is_one_line(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(InputError) as raised:
        load(folder)
    assert "\n" not in str(raised.value)
