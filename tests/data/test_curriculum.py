"""The length curriculum as a function of the step, and what is said about one that does not go with its run."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusiontree.data.curriculum import CurriculumSettings, LengthSchedule
from fusiontree.errors import InputError, SettingError
from fusiontree.train.settings import RunSettings


def schedule(curriculum: dict[str, Any], **changes: int) -> LengthSchedule:
    run = {"batch_size": 8, "max_seq_length": 1024, "max_steps": 1000} | changes
    return CurriculumSettings.parse(curriculum, where="curriculum").schedule(**run)


def ends(found: LengthSchedule) -> list[tuple[int, int, int | None]]:
    return [(stage.length, stage.batch_size, stage.last_step) for stage in found.stages]


def test_without_settings_every_step_has_the_runs_shape():
    found = schedule({})
    assert ends(found) == [(1024, 8, None)] and not found.varies
    assert found.at(1) == found.at(10**9)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("conservative", [(512, 16, 200), (1024, 8, None)]),
        ("standard", [(256, 32, 200), (512, 16, 500), (1024, 8, None)]),
        ("aggressive", [(128, 64, 200), (256, 32, 450), (512, 16, 700), (1024, 8, None)]),
    ],
)
def test_presets(preset, expected):
    assert ends(schedule({"preset": preset})) == expected


def test_a_presets_lengths_are_multiples_of_8_of_at_least_16_and_equal_neighbours_are_one():
    assert ends(schedule({"preset": "standard"}, max_seq_length=24, batch_size=2)) == [(16, 3, 500), (24, 2, None)]
    assert ends(schedule({"preset": "conservative"}, max_seq_length=84, batch_size=10))[0] == (40, 21, 200)


def test_a_stage_of_a_preset_that_has_no_step_is_left_out():
    assert ends(schedule({"preset": "aggressive"}, max_steps=2)) == [(256, 32, 1), (1024, 8, None)]
    assert ends(schedule({"preset": "conservative"}, max_steps=1)) == [(1024, 8, None)]


def test_stages_end_after_steps_or_tokens_of_all_devices():
    stages = [{"length": 128, "steps": 10}, {"length": 512, "tokens": 100_000}, {"length": 256, "steps": 1}]
    # 4 micro-batches of 8192 tokens: 100,000 tokens are 3.05 steps.
    found = schedule({"stages": stages}, micro_batches=4)
    assert ends(found) == [(128, 64, 10), (512, 16, 14), (256, 32, 15), (1024, 8, None)]
    lengths = [found.at(step).length for step in (1, 10, 11, 14, 15, 16, 5000)]
    assert lengths == [128, 128, 512, 512, 256, 1024, 1024]
    assert str(found) == "128 tokens to step 10, 512 tokens to step 14, 256 tokens to step 15, then 1,024"


@given(
    batch_size=st.integers(1, 12),
    max_seq_length=st.integers(2, 96),
    stages=st.lists(st.tuples(st.integers(2, 96), st.integers(1, 5)), min_size=1, max_size=4),
)
def test_every_micro_batch_has_the_same_tokens_or_the_stage_is_named(batch_size, max_seq_length, stages):
    section = {"stages": [{"length": length, "steps": steps} for length, steps in stages]}
    tokens = batch_size * max_seq_length
    wrong = [i for i, (length, _) in enumerate(stages) if length > max_seq_length or tokens % length]
    if wrong:
        with pytest.raises(SettingError) as caught:
            schedule(section, batch_size=batch_size, max_seq_length=max_seq_length)
        assert caught.value.key == f"curriculum.stages.{wrong[0]}.length"
        return
    found = schedule(section, batch_size=batch_size, max_seq_length=max_seq_length)
    last_steps = list(accumulate(steps for _, steps in stages))
    for step in range(1, last_steps[-1] + 3):
        stage = found.at(step)
        assert stage.batch_size * stage.length == tokens
        running = [length for (length, _), end in zip(stages, last_steps, strict=True) if step <= end]
        assert stage.length == (running[0] if running else max_seq_length)


@pytest.mark.parametrize(
    ("curriculum", "training", "key", "said"),
    [
        ({"stages": []}, {}, "curriculum.stages", "at least 1 item"),
        ({"stages": [{"length": 256}]}, {}, "curriculum.stages.0", "no end: give steps or tokens"),
        ({"stages": [{"steps": 5}]}, {}, "curriculum.stages.0.length", "is missing"),
        (
            {"stages": [{"length": 256, "steps": 5}, {"length": 256, "steps": 5, "tokens": 9}]},
            {},
            "curriculum.stages.1",
            "steps and tokens are both given",
        ),
        ({"stages": [{"length": 1, "steps": 5}]}, {}, "curriculum.stages.0.length", "greater than or equal to 2"),
        ({"stages": [{"length": 256, "steps": 0}]}, {}, "curriculum.stages.0.steps", "greater than or equal to 1"),
        ({"stages": [{"lenght": 256, "steps": 5}]}, {}, "curriculum.stages.0.lenght", "did you mean curriculum.stages"),
        (
            {"stages": [{"length": 2048, "steps": 5}]},
            {},
            "curriculum.stages.0.length",
            "rows of 2048 tokens are longer than training.max_seq_length 1024",
        ),
        (
            {"stages": [{"length": 256, "steps": 5}, {"length": 300, "steps": 5}]},
            {},
            "curriculum.stages.1.length",
            "no whole number of rows of 300 tokens makes a micro-batch of training.batch_size * training.max_seq_length"
            " = 8192 tokens: use 256 or 512",
        ),
        ({"stages": [{"length": 2, "steps": 5}]}, {"batch_size": 1, "max_seq_length": 9}, None, ": use 3"),
        (
            {"preset": "standard"},
            {"max_seq_length": 1000},
            "curriculum.preset",
            "no whole number of rows of 248 tokens",
        ),
        (
            {"preset": "standard"},
            {"max_seq_length": 1000},
            "curriculum.preset",
            "make training.max_seq_length a multiple of 32, or give curriculum.stages",
        ),
        ({"preset": "standard"}, {"max_seq_length": 16}, "curriculum.preset", "have at least 16 tokens"),
        ({"preset": "standrad"}, {}, "curriculum.preset", "standard"),
        (
            {"preset": "standard", "stages": [{"length": 256, "steps": 5}]},
            {},
            "curriculum",
            "preset and stages are both given: set one of them to null",
        ),
    ],
)
def test_mistakes_are_named(curriculum, training, key, said):
    with pytest.raises(InputError) as caught:
        RunSettings.parse({"curriculum": curriculum, "training": training})
    sentence = str(caught.value)
    assert said in sentence and "\n" not in sentence
    if key is not None:
        assert isinstance(caught.value, SettingError) and caught.value.key == key
        assert sentence.startswith(key)


@pytest.mark.parametrize(("preset", "multiple"), [("conservative", 16), ("standard", 32), ("aggressive", 64)])
def test_the_multiple_that_an_error_advises_always_works(preset, multiple):
    for times in range(1, 40):
        schedule({"preset": preset}, batch_size=1, max_seq_length=max(times * multiple, 32))
