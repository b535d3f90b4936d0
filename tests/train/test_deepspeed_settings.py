"""What a DeepSpeed JSON and a launcher may ask for: the run does as they say, or ends with a sentence first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusiontree.cli import main


@pytest.fixture
def refusal(run_settings, tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]):
    """Run `train` on the CPU with some system settings and arguments: its one sentence."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which the run sets, and puts it back here

    def call(system: dict[str, Any], *arguments: str, **sections: Any) -> str:
        run = tmp_path / "run"
        settings = run_settings(output_dir=str(run), system={"device": "cpu"} | system, **sections)
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(settings))
        capfd.readouterr()
        code = main(["train", "--config", str(config), *arguments])
        captured = capfd.readouterr()
        (line,) = captured.err.splitlines()
        assert code == 2 and line.startswith("error: ") and not run.exists()
        return line.removeprefix("error: ")

    return call


ZERO_2 = {"stage": 2}
CONTENT = [
    ({"zero_optimization": 2}, 'zero_optimization is 2, not a section: write {"stage": 2}'),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: set it to 1, 2 or 3"),
    (
        {"zero_optimization": ZERO_2 | {"offload_optimizer": "cpu"}},
        'offload_optimizer is "cpu": write {"device": "cpu"}',
    ),
    ({"zero_optimization": ZERO_2 | {"offload_optimizer": {"devise": "cpu"}}}, '{"devise": "cpu"}: write {"device"'),
    ({"zero_optimization": ZERO_2 | {"cpu_offload": True}}, "cpu_offload is now called offload_optimizer"),
    (
        {"zero_optimization": ZERO_2 | {"offload_optimizer": {"device": "cpu", "pin": True}}},
        "zero_optimization.offload_optimizer.pin is no key of DeepSpeed's",
    ),
    (
        {"zero_optimization": ZERO_2 | {"offload_param": {"device": "cpu"}}},
        "zero_optimization.offload_param needs stage 3 but stage is 2",
    ),
    (
        {"zero_optimization": ZERO_2 | {"reduce_bucket_sise": 5}},
        "zero_optimization.reduce_bucket_sise is no key of DeepSpeed's; did you mean reduce_bucket_size?",
    ),
    (
        {"zero_optimization": ZERO_2 | {"reduce_bucket_size": "big"}},
        "zero_optimization.reduce_bucket_size: Input should be a valid integer",
    ),
    *(
        ({"zero_optimization": {"stage": 3, key: True}}, f"zero_optimization.{key}: checkpoints hold float32 weights")
        for key in ("gather_16bit_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save")
    ),
    ({"gradient_cliping": 1.0}, "gradient_cliping is no key of DeepSpeed's; did you mean gradient_clipping?"),
    ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5 but the training section makes it 1.0: set it to auto"),
    ({"comms_logger": {"enabled": "perhaps"}}, "comms_logger.enabled: Input should be a valid boolean"),
    ({"tensorboard": {"enabled": True, "where": "x"}}, "tensorboard.where is no key of DeepSpeed's"),
    ({"flops_profiler": 3}, "flops_profiler: DeepSpeed does not accept it"),
    ({"checkpoint": {"tag_validation": "no"}}, "checkpoint: DeepSpeed does not accept it: Checkpoint config contains"),
    ({"fp16": {"enabled": True}}, "fp16: parameters stay float32"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled is true but a run has false: remove it"),
    ({"zero_force_ds_cpu_optimizer": True}, "zero_force_ds_cpu_optimizer is true but a run has false: remove it"),
    ({"steps_per_print": 10}, "steps_per_print is 10 but a run has null: remove it"),
]


@pytest.mark.parametrize(("content", "said"), CONTENT)
def test_what_deepspeed_cannot_do_is_told_with_file_and_key(
    refusal, tmp_path: Path, content: dict[str, Any], said: str
) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": ZERO_2} | content))
    sentence = refusal({"deepspeed_config": str(file)})
    assert sentence.startswith(f"{file}: ") and said in sentence


def test_the_dry_run_lets_deepspeed_read_its_file_too(refusal, tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": ZERO_2 | {"reduce_bucket_sise": 5}}))
    sentence = refusal({"deepspeed_config": str(file)}, "--dry-run")
    assert sentence.startswith(f"{file}: zero_optimization.reduce_bucket_sise is no key of DeepSpeed's")


@pytest.mark.parametrize(
    ("system", "asked", "said"),
    [
        ({"zero_stage": 2}, {"DEEPSPEED_ZERO_STAGE": "3"}, "the ZeRO stage is 2"),
        ({"zero_stage": 2}, {"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload_optimizer is none"),
        ({"zero_stage": 3}, {"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "offload_param is none"),
        (
            {"zero_stage": 2, "offload_optimizer": True},
            {"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"},
            "offload_optimizer is cpu",
        ),
        ({"zero_stage": 3}, {"DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}, "saving 16-bit weights is false"),
        ({"zero_stage": 2}, {"DEEPSPEED_CONFIG_FILE": "ds.json"}, "system.deepspeed_config is none"),
        ({"zero_stage": 2}, {"GRADIENT_ACCUMULATION_STEPS": "8"}, "training.gradient_accumulation_steps is 2"),
        ({"zero_stage": 2}, {"GRADIENT_CLIPPING": "0.5"}, "training.grad_clip is 1.0"),
    ],
)
def test_a_launcher_that_asks_for_something_else_is_refused(
    refusal, monkeypatch, system: dict[str, Any], asked: dict[str, str], said: str
) -> None:
    """`accelerate launch` hands its options on as variables."""
    ((name, value),) = asked.items()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv(f"ACCELERATE_{name}", value)
    sentence = refusal(system)
    assert sentence == f"the launcher asks for {value} (ACCELERATE_{name}) but {said}: make them equal"


def test_a_launcher_that_asks_for_the_same_is_heard(refusal, monkeypatch, tmp_path: Path) -> None:
    """The run then fails for another reason."""
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}))
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "USE_DEEPSPEED": "true",
        "DEEPSPEED_CONFIG_FILE": "ds.json",
        "DEEPSPEED_ZERO_STAGE": "3",
        "DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
        "GRADIENT_ACCUMULATION_STEPS": "2",
        "GRADIENT_CLIPPING": "1.0",
        "MIXED_PRECISION": "fp16",
    }.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    assert "the launcher asks for fp16 (ACCELERATE_MIXED_PRECISION)" in refusal({"deepspeed_config": str(file)})


@pytest.mark.parametrize(
    ("system", "key"), [({"zero_stage": 2}, "zero_stage"), ({"deepspeed_config": "x.json"}, "deepspeed_config")]
)
def test_zero_without_deepspeed_is_refused(refusal, monkeypatch, system: dict[str, Any], key: str) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what an import finds then is no such package
    sentence = refusal(system)
    assert f"system.{key} asks for DeepSpeed, which is not installed: pip install 'fusiontree[deepspeed]'" in sentence
