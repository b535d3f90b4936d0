"""What a training run can be told, section by section; `RunSettings` is the whole YAML file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from fusiontree.config import Settings, apply_overrides, load_yaml, place_in_yaml
from fusiontree.data.curriculum import CurriculumSettings, LengthSchedule
from fusiontree.data.settings import DataSettings
from fusiontree.errors import InputError, SettingError, nearest

TrackerName = Literal["wandb", "tensorboard", "csv"]
# Beside `off` those of the model's `CHECKPOINTING_SCOPES`, spelt out because settings are read without torch.
CheckpointingScope = Literal["off", "mamba", "attention", "branches", "block"]


class TrainingSettings(Settings):
    """Batch, length, optimizer, schedule and intervals. Intervals are in optimizer steps."""

    batch_size: int = Field(8, ge=1, description="rows of one micro-batch on one device")
    gradient_accumulation_steps: int = Field(1, ge=1, description="micro-batches of one optimizer step")
    max_seq_length: int = Field(1024, ge=2, description="tokens in a row")
    max_steps: int = Field(1000, ge=1, description="optimizer steps of the whole run")
    learning_rate: float = Field(3e-4, gt=0, description="peak, reached after warm-up")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate / peak")
    warmup_steps: int = Field(100, ge=0, description="steps of linear warm-up from 0")
    lr_schedule: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="how the rate comes down after warm-up"
    )
    lr_decay_ratio: float = Field(0.2, gt=0, le=1, description="wsd: share of max_steps, at the end, of its way down")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for weight matrices, AdamW for the rest")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; see train/optim.py for what it spares")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates")
    eps: float = Field(1e-8, gt=0, description="AdamW's denominator term")
    grad_clip: float = Field(1.0, ge=0, description="largest L2 norm of all gradients together; 0 = never clip")
    gradient_checkpointing: bool | CheckpointingScope = Field(
        False, description="what the backward pass recomputes; true = branches (both of them), false = off"
    )
    mixed_precision: Literal["bf16", "no"] = Field("bf16", description="autocast dtype; parameters are float32 always")
    eval_interval: int = Field(500, ge=0, description="also at step 0 and at the end; 0 = never evaluate")
    eval_batches: int | None = Field(
        50, ge=1, description="batches of one evaluation on each device; null = the whole eval set"
    )
    save_interval: int = Field(500, ge=0, description="also at the end; 0 = at the end alone")
    save_total_limit: int | None = Field(3, ge=1, description="newest checkpoints to keep; null = all")
    save_best: bool = Field(False, description="also keep, as `best`, the checkpoint of the lowest evaluation loss")
    max_skipped_steps: int = Field(
        5, ge=0, description="steps in a row left out for not being finite before the run goes back, then stops"
    )
    spike_deviations: float = Field(
        6.0, gt=0, description="standard deviations above the recent mean at which a loss is reported as a spike"
    )
    log_interval: int = Field(10, ge=1, description="steps summarised by one row of metrics.jsonl")
    init_from: str | None = Field(
        None, description="model folder or run whose weights a new run starts from; null = random"
    )

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _unquoted_no(cls, value: object) -> object:
        return "no" if value is False else value  # what YAML makes of a bare `no`

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _known_scope(cls, value: object) -> object:
        scopes = get_args(CheckpointingScope)
        if isinstance(value, bool) or value in scopes:
            return value
        close = nearest(str(value), (*scopes, "true", "false"))
        hint = f" (did you mean {close}?)" if close else ""
        raise ValueError(f"must be true, false or one of {', '.join(scopes)}{hint}")

    @property
    def checkpointing_scope(self) -> str | None:
        """What gradient checkpointing recomputes, by the model's names; None: nothing."""
        if isinstance(self.gradient_checkpointing, bool):
            return "branches" if self.gradient_checkpointing else None
        return None if self.gradient_checkpointing == "off" else self.gradient_checkpointing

    @model_validator(mode="after")
    def _betas_below_one(self) -> TrainingSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {list(self.betas)}")
        return self


class LossSettings(Settings):
    """Weights of the composite loss (train/losses.py has the formulas)."""

    load_balance_coeff: float = Field(0.05, ge=0, description="weight of the hinge around the gate target")
    entropy_reg_coeff: float = Field(3e-4, ge=0, description="weight of the gates' negative entropy (nats)")
    gate_target: float = Field(0.5, gt=0, lt=1, description="wanted mean gate; 1 = Mamba alone")
    gate_margin: float = Field(0.05, ge=0, lt=0.5, description="deviation from the target that costs nothing")
    distillation_coeff: float = Field(0.0, ge=0, description="weight of the distillation term; 0 = no teacher")
    distillation_temperature: float = Field(2.0, gt=0, description="softens teacher and student alike")
    hidden_coeff: float = Field(
        0.0, ge=0, description="weight of the distance of each layer's output from the teacher's, of as many layers"
    )
    teacher: str | None = Field(None, description="causal LM to distil from: a local folder or a hub name")
    commit_from: float | None = Field(
        None, ge=0, lt=1, description="share of the steps after which gates commit, see `coefficients_at`; null = never"
    )
    commit_coeff: float | None = Field(
        None, ge=0, description="weight of the gates' entropy at the end, sign turned; null = entropy_reg_coeff"
    )

    @model_validator(mode="after")
    def _teacher_and_weight_together(self) -> LossSettings:
        weights = {name: getattr(self, name) for name in ("distillation_coeff", "hidden_coeff")}
        if self.teacher is None and (given := [name for name, weight in weights.items() if weight > 0]):
            raise ValueError(f"{given[0]} is above 0 but no teacher is named: set loss.teacher")
        if self.teacher is not None and not any(weights.values()):
            raise ValueError("a teacher is named but distillation_coeff is 0: set loss.distillation_coeff")
        return self

    @model_validator(mode="after")
    def _commits_where_asked(self) -> LossSettings:
        if self.commit_coeff is not None and self.commit_from is None:
            raise ValueError("commit_coeff has no effect without commit_from: set both, or neither")
        return self


class GateMonitorSettings(Settings):
    """What is recorded about the gates, and the thresholds of the gate-threshold prune plan."""

    enabled: bool = Field(True, description="record gates.jsonl")
    interval: int = Field(100, ge=1, description="optimizer steps between two records")
    export_plan: bool = Field(True, description="write prune_plan.json into the run directory with each checkpoint")
    mamba_threshold: float = Field(0.8, gt=0, lt=1, description="mean gate above which a layer keeps Mamba alone")
    attention_threshold: float = Field(0.2, gt=0, lt=1, description="mean gate below which it keeps attention alone")
    plan_records: int = Field(5, ge=1, description="newest records whose mean gate decides")
    plan_min_steps: int = Field(1000, ge=0, description="before this step no layer is ever cut")
    plan_max_std: float = Field(0.25, gt=0, description="standard deviation of the gate above which no layer is cut")
    plan_confidence: float = Field(
        0.5, ge=0, le=1, description="share of those records that must each lie beyond the threshold"
    )

    @model_validator(mode="after")
    def _thresholds_in_order(self) -> GateMonitorSettings:
        if self.attention_threshold >= self.mamba_threshold:
            raise ValueError("attention_threshold must be below mamba_threshold")
        return self


class LoggingSettings(Settings):
    """How a run shows itself while it trains, and where else (train/trackers.py)."""

    progress: Literal["auto", "live", "plain", "none"] = Field(
        "auto", description="auto = a live line on a terminal, plain lines elsewhere"
    )
    trackers: tuple[TrackerName, ...] = Field((), description="wandb, tensorboard, csv: each shows metrics.jsonl")
    wandb_project: str = Field("fusiontree", description="project of the W&B run")
    wandb_entity: str | None = Field(None, description="user or team that it belongs to; null = the login's own")
    wandb_name: str | None = Field(None, description="its name; null = that of the run directory")
    wandb_mode: Literal["online", "offline"] | None = Field(None, description="null = WANDB_MODE, else online")

    @field_validator("trackers", mode="before")
    @classmethod
    def _known_trackers(cls, value: object) -> object:
        names = (value,) if isinstance(value, str) else value
        known = get_args(TrackerName)
        for name in names if isinstance(names, (list, tuple)) else ():
            if name not in known:
                close = nearest(str(name), known)
                hint = f"; did you mean {close}?" if close else ""
                raise ValueError(f"there is no tracker {name!r}, only {', '.join(known)}{hint}")
        return tuple(dict.fromkeys(names)) if isinstance(names, (list, tuple)) else names


class SystemSettings(Settings):
    """Devices and engines. What is asked for is what runs; a fallback is an error."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = CUDA where there is a device")
    num_devices: int | None = Field(None, ge=1, description="devices the run is meant for; null = as launched")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of torch; null = torch decides")
    peak_tflops: float | None = Field(None, gt=0, description="peak of one device, for mfu; null = known GPUs in bf16")
    zero_stage: Literal[0, 1, 2, 3] = Field(0, description="DeepSpeed ZeRO stage; 0 = that of the JSON, or none")
    deepspeed_config: str | None = Field(None, description="DeepSpeed JSON file; what it leaves out is set from here")
    offload_optimizer: bool = Field(False, description="optimizer state in host memory (ZeRO)")
    offload_params: bool = Field(False, description="parameters in host memory (ZeRO-3)")
    fsdp: bool = Field(False, description="FSDP2: parameters, gradients and optimizer state in shards")
    timeout: int = Field(1800, ge=1, description="seconds that processes wait for one another before the run ends")

    @property
    def uses_deepspeed(self) -> bool:
        return self.zero_stage > 0 or self.deepspeed_config is not None

    @property
    def is_sharded(self) -> bool:
        """Whether an engine runs that divides its state among processes."""
        return self.uses_deepspeed or self.fsdp

    @property
    def engine(self) -> str:
        """What trains, in words."""
        if self.fsdp:
            return "FSDP2"
        if self.uses_deepspeed:
            return f"DeepSpeed ZeRO-{self.zero_stage}" if self.zero_stage else f"DeepSpeed ({self.deepspeed_config})"
        return "plain training or DDP"

    @model_validator(mode="after")
    def _one_engine(self) -> SystemSettings:
        if self.fsdp and self.uses_deepspeed:
            raise ValueError("fsdp and DeepSpeed (zero_stage, deepspeed_config) are two engines: keep one")
        if self.offload_optimizer and not self.uses_deepspeed:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3")
        if self.offload_params and self.zero_stage != 3 and self.deepspeed_config is None:
            raise ValueError("offload_params needs zero_stage 3")
        return self


class RunSettings(Settings):
    """A whole run. `model` goes to `HybridLanguageModelConfig` as it stands and is checked there."""

    model: dict[str, Any] = Field(default_factory=dict, description="fields of HybridLanguageModelConfig")
    data: DataSettings = Field(default_factory=DataSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    curriculum: CurriculumSettings = Field(default_factory=CurriculumSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    gate_monitor: GateMonitorSettings = Field(default_factory=GateMonitorSettings)
    logging: LoggingSettings = Field(default_factory=LoggingSettings)
    system: SystemSettings = Field(default_factory=SystemSettings)
    output_dir: str = Field("runs/default", description="the run directory; from a file: runs/<name of the file>")
    seed: int = Field(0, ge=0, lt=2**32, description="of initialisation, data order, dropout and branch dropout")

    @model_validator(mode="after")
    def _optimizer_fits_engine(self) -> RunSettings:
        if self.training.optimizer == "muon" and self.system.uses_deepspeed:
            raise SettingError(
                f"training.optimizer: muon needs matrices, which {self.system.engine} takes apart into flat shares: "
                "set it to adamw, or train with DDP or system.fsdp",
                "training.optimizer",
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> RunSettings:
        if self.training.save_best and not self.evaluates:
            raise SettingError(
                "training.save_best: that is the checkpoint of the lowest evaluation loss: name data.eval_paths and "
                "set training.eval_interval above 0, or leave save_best out",
                "training.save_best",
            )
        return self

    @model_validator(mode="after")
    def _curriculum_fits_training(self) -> RunSettings:
        if self.length_schedule().varies and self.data.packing == "best_fit":
            raise SettingError(
                "data.packing: best_fit makes rows of one length: set it to concatenate, or leave the curriculum out",
                "data.packing",
            )
        return self

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates on the way: how often is said, and on what."""
        return self.training.eval_interval > 0 and len(self.data.eval_paths) > 0

    def length_schedule(self, devices: int = 1) -> LengthSchedule:
        """Which shape each step's batches have.

        Args:
            devices: that share an optimizer step.

        Raises:
            SettingError: a stage of the curriculum that does not go with the training section.
        """
        t = self.training
        return self.curriculum.schedule(
            batch_size=t.batch_size,
            max_seq_length=t.max_seq_length,
            max_steps=t.max_steps,
            micro_batches=t.gradient_accumulation_steps * devices,
        )


def load_run_settings(config_path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunSettings:
    """Read a run's YAML file and its `key=value` overrides.

    Raises:
        InputError: the file is missing or broken, a key is unknown (the nearest is named) or a value impossible; a
            mistake in the file is told with its line. The section `model` is checked where the model is built: see
            `placing_mistakes`.
    """
    mapping = apply_overrides(load_yaml(config_path), list(overrides))
    mapping.setdefault("output_dir", f"runs/{Path(config_path).stem}")
    with placing_mistakes(config_path, overrides):
        return RunSettings.parse(mapping, where="")


@contextmanager
def placing_mistakes(config: object, overrides: Sequence[str] = ()) -> Iterator[None]:
    """Within it a `SettingError` about what a YAML file writes becomes one that begins with file and line.

    Args:
        config: the file's path; nothing is placed in anything else.
        overrides: of the file. A mistake that one of them may have made, above or below its key, is not the file's.
    """
    try:
        yield
    except SettingError as error:
        given = [f"{override.partition('=')[0].strip()}." for override in overrides]
        is_overridden = any(
            f"{key}.".startswith(one) or one.startswith(f"{key}.") for key in error.keys for one in given
        )
        if is_overridden or not isinstance(config, (str, os.PathLike)):
            raise
        places = (place_in_yaml(config, key) for key in error.keys)
        place = next((place for place in places if place is not None), None)
        if place is None:
            raise
        raise InputError(f"{place}: {error}") from error


def as_run_settings(
    config: RunSettings | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()
) -> RunSettings:
    """`RunSettings` from any of: itself, a mapping of sections, the path of a YAML file.

    Raises:
        InputError: as `load_run_settings`, or overrides beside settings that are already parsed.
    """
    if isinstance(config, RunSettings):
        if overrides:
            raise InputError("overrides apply to a YAML file or a mapping, not to parsed RunSettings")
        return config
    if isinstance(config, Mapping):
        return RunSettings.parse(apply_overrides(dict(config), list(overrides)), where="")
    return load_run_settings(config, overrides)
