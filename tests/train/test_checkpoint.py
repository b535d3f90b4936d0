"""Checkpoints are whole or absent, hold only data, and give back everything."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fusiontree
from fusiontree import HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.errors import InputError
from fusiontree.train.checkpoint import load_model, load_moments, weights_fingerprint
from fusiontree.train.checkpoint_files import check_files, newest_checkpoint
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings


def engine(sections: dict[str, Any], resume: str | None = None) -> TrainingEngine:
    return TrainingEngine(RunSettings.parse(sections), resume=resume)


@pytest.fixture(scope="session")
def trained(run_settings, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("trained")
    training = {"max_steps": 2, "save_interval": 1, "eval_interval": 0}
    sections = run_settings(training=training, output_dir=str(directory / "run"))
    fusiontree.train(sections)
    return sections


@pytest.fixture
def run(trained: dict[str, Any], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a run of two steps, to damage, and its settings."""
    directory = tmp_path / "run"
    shutil.copytree(trained["output_dir"], directory, symlinks=True)
    return directory, copy.deepcopy(trained) | {"output_dir": str(directory)}


def test_a_checkpoint_is_a_model_for_transformers_too(run) -> None:
    path = newest_checkpoint(run[0])
    assert path.name == "step_00000002"
    model = AutoModelForCausalLM.from_pretrained(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer("the quick brown", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert (path / "generation_config.json").is_file()


def test_a_checkpoint_holds_data_alone(run) -> None:
    suffixes = {file.suffix for file in newest_checkpoint(run[0]).rglob("*") if file.is_file()}
    assert suffixes <= {".safetensors", ".json", ".txt", ".jinja"}


def test_only_the_newest_checkpoints_are_kept(run_settings, tmp_path: Path) -> None:
    sections = run_settings(
        output_dir=str(tmp_path / "run"),
        training={"save_interval": 1, "save_total_limit": 2, "max_steps": 4, "eval_interval": 0},
    )
    fusiontree.train(sections)
    directory = Path(sections["output_dir"])
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step_00000003", "step_00000004"]
    assert (directory / "latest").resolve().name == "step_00000004"


def test_resuming_restores_the_optimizer(run) -> None:
    directory, sections = run
    before = engine(run[1], resume="auto")
    for group in before.parallel.optimizers[0].param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            state = before.parallel.optimizers[0].state[parameter]
            assert state["step"].item() == 2, name
            assert state["exp_avg"].shape == parameter.shape
    saved = load_moments(directory / "checkpoints" / "step_00000002")
    parameter = before.parallel.optimizers[0].param_groups[0]["params"][0]
    name = before.parallel.optimizers[0].param_groups[0]["names"][0]
    torch.testing.assert_close(
        before.parallel.optimizers[0].state[parameter]["exp_avg_sq"], saved[f"{name}.exp_avg_sq"]
    )


FILES = ["model.safetensors", "training_state/process-00000.safetensors", "training_state/state.json", "config.json"]


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("name", [*FILES, "training_state/files.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_one_clear_error(run, name: str, how: str) -> None:
    directory, sections = run
    checkpoint = newest_checkpoint(directory)
    damage(checkpoint / name, how)
    before = (directory / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match=f"step_00000002.*{how}|step_00000002.*not a whole") as caught:
        engine(sections, resume=str(checkpoint))
    assert Path(name).name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (directory / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", FILES)
def test_one_bit_is_enough(run, name: str) -> None:
    directory, sections = run
    checkpoint = newest_checkpoint(directory)
    damage(checkpoint / name, "flipped")
    with pytest.raises(InputError, match=f"step_00000002 is damaged: {name} is not what was written"):
        engine(sections, resume=str(checkpoint))


@pytest.mark.parametrize("how", ["truncated", "missing", "flipped"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_that_is_said(run, how: str, capsys) -> None:
    directory, sections = run
    damage(directory / "checkpoints" / "step_00000002" / "model.safetensors", how)
    sections |= {"training": sections["training"] | {"max_steps": 3}, "logging": {"progress": "plain"}}
    assert fusiontree.train(sections, resume="auto").step == 3
    shown = capsys.readouterr().err
    assert "passed over: checkpoint" in shown and "resumed from" in shown
    assert "checkpoints/step_00000001" in shown.partition("resumed from ")[2].splitlines()[0]


def test_without_a_whole_checkpoint_nothing_is_trained(run) -> None:
    directory, sections = run
    for step in (1, 2):
        damage(directory / "checkpoints" / f"step_0000000{step}" / "model.safetensors", "truncated")
    with pytest.raises(InputError, match="has no checkpoint that is whole"):
        engine(sections, resume="auto")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 64}, "model.hidden_size 32"),
        ({"num_layers": 3}, "model.num_layers 2"),
        ({"mamba_version": 1}, "model.mamba_version 2"),
        ({"vocab_size": 512}, "model.vocab_size 320"),
    ],
)
def test_a_checkpoint_of_another_shape_is_one_clear_error(run, change: dict[str, Any], said: str) -> None:
    directory, sections = run
    sections["model"] |= change
    with pytest.raises(InputError, match=said):
        engine(sections, resume="auto")


def test_a_weights_file_without_a_tensor_is_refused(run) -> None:
    from safetensors.torch import load_file, save_file

    path = newest_checkpoint(run[0])
    tensors = load_file(path / "model.safetensors")
    tensors.pop("layers.0.fusion_proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys: layers\.0\.fusion_proj\.weight"):
        load_model(path)


def test_a_copied_checkpoint_is_checked_by_its_sizes(run, tmp_path: Path) -> None:
    shutil.copytree(newest_checkpoint(run[0]), tmp_path / "step_00000002")
    check_files(tmp_path / "step_00000002")
    with (tmp_path / "step_00000002" / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(InputError, match=r"tokenizer\.json has \d+ bytes instead of"):
        check_files(tmp_path / "step_00000002")


def test_another_corpus_or_tokenizer_does_not_resume(run, tmp_path: Path) -> None:
    directory, sections = run
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "seven silver birds sing about the rivers and the cities"}\n' * 50)
    sections["data"]["train_paths"] = str(other)
    with pytest.raises(InputError, match="place in the data does not fit"):
        engine(sections, resume="auto")


@pytest.mark.parametrize("followed", [True, False])
def test_a_copy_of_a_run_resumes(run, tmp_path: Path, followed: bool) -> None:
    """Some ways of copying leave a real folder where `latest` was a link, others nothing."""
    directory, sections = run
    copied = tmp_path / "copy"
    shutil.copytree(directory, copied, ignore=None if followed else shutil.ignore_patterns("latest"))
    assert newest_checkpoint(copied) == copied / "checkpoints" / "step_00000002"
    sections |= {"output_dir": str(copied), "training": sections["training"] | {"max_steps": 3}}
    assert fusiontree.train(sections, resume="auto").step == 3
    assert (copied / "latest").is_symlink() and (copied / "latest").resolve().name == "step_00000003"


def test_a_checkpoint_that_was_set_aside_is_put_back(run) -> None:
    directory, sections = run
    checkpoints = directory / "checkpoints"
    # What a kill between the two renames of a replacement leaves.
    (checkpoints / "step_00000002").rename(checkpoints / ".step_00000002.0123abcd.old")
    (checkpoints / ".step_00000002.89ef0123.tmp").mkdir()
    engine(sections, resume="auto")
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000001", "step_00000002"]
    check_files(checkpoints / "step_00000002")


def test_checkpoints_of_a_course_given_up_go_first(run_settings, tmp_path: Path) -> None:
    training = {"save_interval": 1, "save_total_limit": 3, "max_steps": 5, "eval_interval": 0}
    sections = run_settings(output_dir=str(tmp_path / "run"), training=training)
    fusiontree.train(sections)
    checkpoints = tmp_path / "run" / "checkpoints"
    sections["training"]["max_steps"] = 4
    fusiontree.train(sections, resume=str(checkpoints / "step_00000003"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000003", "step_00000004", "step_00000005"]
    sections["training"] |= {"max_steps": 6, "save_total_limit": 2}
    fusiontree.train(sections, resume=str(checkpoints / "step_00000003"))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000005", "step_00000006"]


def test_a_learned_time_encoding_keeps_its_length(run_settings, tmp_path: Path) -> None:
    model = {"srte_encoding": "learned", "max_position_embeddings": 32}
    training = {"max_steps": 1, "eval_interval": 0}
    sections = run_settings(output_dir=str(tmp_path / "run"), model=model, training=training)
    fusiontree.train(sections)
    sections["model"]["max_position_embeddings"] = 64
    with pytest.raises(InputError, match=r"model\.max_position_embeddings 32, the configuration asks for 64"):
        engine(sections, resume="auto")


def test_a_run_that_never_began_is_no_run(run_settings, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": "a"}\n')
    sections = run_settings(output_dir=str(tmp_path / "run"), training={"max_steps": 1})
    wrong = sections | {"data": sections["data"] | {"eval_paths": str(empty), "document_separator": None}}
    with pytest.raises(InputError, match="no token of the evaluation data can be predicted"):
        fusiontree.train(wrong)
    assert fusiontree.train(sections).step == 1


def test_a_models_fingerprint_stays_what_it_was() -> None:
    """Plans are bound to it: a field that comes in and has no value must not change it."""
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "global_heads": 2, "window_size": 4}
    sizes |= {"mamba_head_dim": 8, "mamba_state_size": 4, "gate_rank": 4, "srte_rank": 4, "mlp": "aligned"}
    model = HybridLanguageModel(HybridLanguageModelConfig(**sizes))
    parameters = sorted(model.named_parameters())
    with torch.no_grad():
        for number, (_, parameter) in enumerate(parameters):
            parameter.fill_(number / 8)
    assert weights_fingerprint(model.config, parameters) == "adc395f31da2c541c7eccaa05b2d0fdd"
