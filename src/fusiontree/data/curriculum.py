"""The length curriculum: shorter rows first, more of them, so that every micro-batch holds as many tokens as any other.

    schedule = CurriculumSettings(preset="standard").schedule(batch_size=8, max_seq_length=1024, max_steps=1000)
    schedule.at(1)  # Stage(length=256, batch_size=32, last_step=200)

What a step trains on is a function of the step alone: there is nothing to save or to restore.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from fusiontree.config import Settings
from fusiontree.errors import SettingError

# Stages of a preset before the full length: max_seq_length is divided by the one, the other is per cent of max_steps.
_PRESETS: dict[str, tuple[tuple[int, int], ...]] = {
    "conservative": ((2, 20),),
    "standard": ((4, 20), (2, 30)),
    "aggressive": ((8, 20), (4, 25), (2, 25)),
}
_MULTIPLE = 8  # of a preset's lengths: matrix kernels like whole tiles
_SHORTEST = 16  # length of a preset


@dataclass(frozen=True)
class Stage:
    """Steps in a row whose batches have one shape."""

    length: int
    """Tokens in a row."""
    batch_size: int
    """Rows of a micro-batch on one device."""
    last_step: int | None
    """None: it has no end."""


@dataclass(frozen=True)
class LengthSchedule:
    """The shape of every step's batches; the last stage has no end."""

    stages: tuple[Stage, ...]

    @property
    def varies(self) -> bool:
        """Whether there is more than one length."""
        return len(self.stages) > 1

    def at(self, step: int) -> Stage:
        """The stage of an optimizer step, counted from 1."""
        return next(stage for stage in self.stages if stage.last_step is None or step <= stage.last_step)

    def __str__(self) -> str:
        return ", ".join(
            f"{stage.length:,} tokens to step {stage.last_step:,}" if stage.last_step else f"then {stage.length:,}"
            for stage in self.stages
        )


class StageSettings(Settings):
    """Rows of one length, for so many steps or so many tokens."""

    length: int = Field(ge=2, description="tokens in a row")
    steps: int | None = Field(None, ge=1, description="optimizer steps that the stage takes")
    tokens: int | None = Field(None, ge=1, description="tokens that it takes instead, rounded up to whole steps")

    @model_validator(mode="after")
    def _one_duration(self) -> StageSettings:
        if self.steps is None and self.tokens is None:
            raise ValueError("the stage has no end: give steps or tokens")
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens are both given: keep one of them")
        return self

    def duration(self, tokens_per_step: int) -> int:
        """Optimizer steps that the stage takes."""
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        assert self.steps is not None
        return self.steps


class CurriculumSettings(Settings):
    """Lengths of the rows before `training.max_seq_length`; off unless a preset or stages are given."""

    preset: Literal["conservative", "standard", "aggressive"] | None = Field(
        None, description="stages in proportion to training.max_seq_length and training.max_steps; null = none"
    )
    stages: tuple[StageSettings, ...] | None = Field(
        None, min_length=1, description="stages of one's own, in order; training.max_seq_length holds after the last"
    )

    @model_validator(mode="after")
    def _preset_or_stages(self) -> CurriculumSettings:
        if self.preset is not None and self.stages is not None:
            raise ValueError("preset and stages are both given: set one of them to null")
        return self

    def schedule(
        self, *, batch_size: int, max_seq_length: int, max_steps: int, micro_batches: int = 1
    ) -> LengthSchedule:
        """The stages in steps, each with the rows that keep the tokens of a micro-batch.

        Args:
            batch_size, max_seq_length: rows of a micro-batch and tokens in a row at the full length.
            max_steps: of the run, which presets are relative to.
            micro_batches: of one optimizer step on all devices, by which a stage's tokens become steps.

        Raises:
            SettingError: a length above `max_seq_length`, or one of which no whole number of rows has that many tokens.
        """
        if self.preset is not None and max_seq_length <= _SHORTEST:
            key = "curriculum.preset"
            raise SettingError(
                f"{key}: rows of a preset have at least {_SHORTEST} tokens but training.max_seq_length is "
                f"{max_seq_length}: raise it, or set the preset to null",
                key,
            )
        size = batch_size * max_seq_length
        stages: list[Stage] = []
        for key, length, last_step in (
            *self._lengths(max_seq_length, max_steps, size * micro_batches),
            ("training.max_seq_length", max_seq_length, None),
        ):
            if length > max_seq_length:
                raise SettingError(
                    f"{key}: rows of {length} tokens are longer than training.max_seq_length {max_seq_length}: "
                    "shorten them, or raise it",
                    key,
                )
            if size % length:
                raise SettingError(
                    f"{key}: no whole number of rows of {length} tokens makes a micro-batch of training.batch_size * "
                    f"training.max_seq_length = {size} tokens: {self._advice(length, size, max_seq_length)}",
                    key,
                )
            if stages and stages[-1].length == length:
                stages.pop()  # one stage as far as batches go
            stages.append(Stage(length, size // length, last_step))
        return LengthSchedule(tuple(stages))

    def _lengths(self, max_seq_length: int, max_steps: int, tokens_per_step: int) -> list[tuple[str, int, int]]:
        """(setting at fault if the length is wrong, length, last step) of each stage before the full length."""
        found, end = [], 0
        for index, stage in enumerate(self.stages or ()):
            end += stage.duration(tokens_per_step)
            found.append((f"curriculum.stages.{index}.length", stage.length, end))
        percent = 0
        for divisor, share in _PRESETS[self.preset] if self.preset else ():
            percent += share
            length = max(_SHORTEST, round(max_seq_length / divisor / _MULTIPLE) * _MULTIPLE)
            last_step = round(percent * max_steps / 100)
            if last_step > end:  # a short run may have no step for a stage
                found.append(("curriculum.preset", length, last_step))
                end = last_step
        return found

    def _advice(self, length: int, size: int, max_seq_length: int) -> str:
        if self.preset is not None:
            multiple = _MULTIPLE * _PRESETS[self.preset][0][0]
            return f"make training.max_seq_length a multiple of {multiple}, or give curriculum.stages"
        shorter = next((str(n) for n in range(length, 1, -1) if size % n == 0), None)
        longer = next(str(n) for n in range(length, max_seq_length + 1) if size % n == 0)
        return f"use {longer}" if shorter is None else f"use {shorter} or {longer}"
