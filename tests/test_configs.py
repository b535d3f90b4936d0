"""Every shipped configuration is valid and builds, and the format of the original recipe still loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusiontree.models import HybridLanguageModel
from fusiontree.train.launch import checked_deepspeed_config
from fusiontree.train.settings import RunSettings, load_run_settings
from fusiontree.train.setup import model_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
DEEPSPEED_FILES = sorted(CONFIGS[0].parent.glob("*.json"))

# The 8 x A6000 excerpt of the project's original description, as it stands there.
EXCERPT = """\
# configs/pretrain_wikipedia.yaml
training:
  batch_size: 4                    # 每卡micro-batch
  gradient_accumulation_steps: 2   # 总batch=4×8×2×1024=65k tokens
  max_seq_length: 1024             # 实际训练长度
  gradient_checkpointing: true     # 启用选择性重计算

model:
  hidden_size: 1536               # 平衡精度与效率
  num_layers: 18                  # 适中深度
  window_size: 256                # 局部窗口大小
  global_heads: 2                 # 保持长程建模
  max_position_embeddings: 8192   # RoPE缓存大小

system:
  zero_stage: 2                   # ZeRO-2获得更好吞吐
  offload_optimizer: false        # 关闭offload避免I/O瓶颈
  offload_params: false
"""


def build(settings: RunSettings) -> HybridLanguageModel:
    with torch.device("meta"):
        return HybridLanguageModel(model_config(settings))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_builds(path: Path) -> None:
    settings = load_run_settings(path)
    model = build(settings)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert settings.output_dir == f"runs/{path.stem}"
    assert settings.data.tokenizer and (settings.data.train_paths or settings.data.hf_streaming_preset)


def test_the_expected_configurations_ship() -> None:
    assert {path.stem for path in CONFIGS} >= {"quickstart", "pretrain_optimized", "pretrain_wikipedia"}


@pytest.mark.parametrize("path", DEEPSPEED_FILES, ids=lambda path: path.stem)
def test_deepspeed_accepts_every_shipped_file(path: Path, monkeypatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = RunSettings.parse({"system": {"device": "cpu", "deepspeed_config": str(path)}})
    assert checked_deepspeed_config(settings, processes=2)["zero_optimization"]["stage"] == int(path.stem[-1])


def test_the_original_excerpt_loads_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "pretrain_wikipedia.yaml"
    path.write_text(EXCERPT, encoding="utf-8")
    settings = load_run_settings(path)
    assert settings.training.batch_size == 4
    assert settings.training.gradient_checkpointing is True
    assert settings.system.zero_stage == 2
    assert settings.output_dir == "runs/pretrain_wikipedia"
    model = build(settings)
    assert (model.config.hidden_size, model.config.num_layers, model.config.num_heads) == (1536, 18, 12)


def test_the_shipped_recipe_is_the_original_one(tmp_path: Path) -> None:
    path = tmp_path / "excerpt.yaml"
    path.write_text(EXCERPT, encoding="utf-8")
    original, ours = load_run_settings(path), load_run_settings(CONFIGS[0].parent / "pretrain_wikipedia.yaml")
    for key, value in original.model.items():
        assert ours.model[key] == value
    for key in ("batch_size", "gradient_accumulation_steps", "max_seq_length", "gradient_checkpointing"):
        assert getattr(ours.training, key) == getattr(original.training, key)
    assert ours.system.zero_stage == 2 and ours.system.num_devices == 8
    assert ours.training.max_steps == 5000
    tokens = ours.training.batch_size * 8 * ours.training.gradient_accumulation_steps * ours.training.max_seq_length
    assert tokens == 65_536


@pytest.mark.parametrize("written", ["no", '"no"', "false"])
def test_mixed_precision_can_be_switched_off_without_quotes(tmp_path: Path, written: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training:\n  mixed_precision: {written}\n")
    assert load_run_settings(path).training.mixed_precision == "no"
    assert load_run_settings(path, [f"training.mixed_precision={written}"]).training.mixed_precision == "no"


@pytest.mark.parametrize(
    ("written", "scope"),
    [("true", "branches"), ("false", None), ("off", None), ("mamba", "mamba"), ("attention", "attention")]
    + [("branches", "branches"), ("block", "block")],
)
def test_gradient_checkpointing_takes_a_switch_or_a_scope(tmp_path: Path, written: str, scope: str | None) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"training:\n  gradient_checkpointing: {written}\n")
    assert load_run_settings(path).training.checkpointing_scope == scope
    assert load_run_settings(path, [f"training.gradient_checkpointing={written}"]).training.checkpointing_scope == scope
