"""Settings: what a YAML file and overrides become, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from fusiontree.config import InputError, Settings, apply_overrides, dump_yaml, load_yaml, nearest


class Inner(Settings):
    hidden_size: int = Field(8, gt=0)
    """Width."""
    paths: list[str] = []


class Section(Settings):
    batch_size: int
    """Rows."""
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    inner: Inner | None = None

    @model_validator(mode="after")
    def _check(self) -> Section:
        if self.batch_size == 13:
            raise ValueError("batch_size must not be unlucky")
        return self


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def error_of(function: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_load_yaml_reads_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "training:\n  lr: 3e-4\n  shuffle: true\n  name: 'x'\nempty:\n")
    assert load_yaml(path) == {"training": {"lr": 3e-4, "shuffle": True, "name": "x"}, "empty": None}


def test_an_empty_file_is_an_empty_mapping(tmp_path: Path) -> None:
    assert load_yaml(write(tmp_path / "c.yaml", "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a: 1\n b: 2\n", "line 2"),
        ("a: 1\na: 2\n", "duplicate key a"),
        (b"a: \xff\xfe\n", "not UTF-8"),
        ("- a\n- b\n", "must hold a mapping"),
        ("1: 2\n", "must hold a mapping"),
        ("a: ${\n", "c.yaml"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_an_unusable_file_is_named_with_its_fault(tmp_path: Path, content: str | bytes, says: str) -> None:
    path = write(tmp_path / "c.yaml", content)
    message = error_of(load_yaml, path)
    assert str(path) in message
    assert says in message


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.yaml'} does not exist" in error_of(load_yaml, tmp_path / "no.yaml")
    assert str(tmp_path) in error_of(load_yaml, tmp_path)


def test_overrides_set_nested_keys_and_leave_the_argument_alone() -> None:
    mapping = {"training": {"lr": 1.0, "steps": 5}, "empty": None}
    result = apply_overrides(mapping, ["training.lr=3e-4", "training.lr=2e-4", "empty.x=[1, a]", "new.deep.key=a=b"])
    assert result == {
        "training": {"lr": 2e-4, "steps": 5},
        "empty": {"x": [1, "a"]},
        "new": {"deep": {"key": "a=b"}},
    }
    assert mapping == {"training": {"lr": 1.0, "steps": 5}, "empty": None}


def test_interpolation_sees_overrides(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", "a: {n: 1}\nb: ${a.n}\nname: run_${a.n}\n")
    assert apply_overrides(load_yaml(path), ["a.n=7"]) == {"a": {"n": 7}, "b": 7, "name": "run_7"}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["training.lr"], "must look like section.key=value"),
        (["=3"], "must look like section.key=value"),
        (["training..lr=3"], "must look like section.key=value"),
        (["training.lr=[1,"], "not valid YAML"),
        (["rows.x=1"], "rows.x=1"),
        (["training.lr=${nowhere}"], "nowhere"),
        (["training.lr=${training.lr}"], "training.lr"),
    ],
)
def test_a_wrong_override_is_quoted(overrides: list[str], says: str) -> None:
    assert says in error_of(apply_overrides, {"training": {"lr": 1.0}, "rows": [1, 2]}, overrides)


def test_parse_gives_frozen_settings() -> None:
    section = Section.parse({"batch_size": 4, "betas": [0.8, 0.9], "inner": {"hidden_size": 2}}, where="training")
    assert (section.batch_size, section.betas, section.inner) == (4, (0.8, 0.9), Inner(hidden_size=2))
    with pytest.raises(ValueError, match="frozen"):
        section.batch_size = 5  # type: ignore[misc]
    assert Section.model_fields["batch_size"].description == "Rows."


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ({"batchsize": 4}, "training.batchsize is not a known setting; did you mean training.batch_size?"),
        ({"batch_size": 1, "inner": {"Hidden-Size": 4}}, "training.inner.Hidden-Size is not a known setting"),
        ({"batch_size": 1, "inner": {"Hidden-Size": 4}}, "did you mean training.inner.hidden_size?"),
        ({"batch_size": 1, "zzz": 4}, "known here: batch_size, learning_rate, betas, inner"),
        ({}, "training.batch_size is missing"),
        (None, "training.batch_size is missing"),
        ({"batch_size": "many"}, "training.batch_size: input should be a valid integer"),
        ({"batch_size": "many"}, "got 'many'"),
        ({"batch_size": 1, "learning_rate": float("nan")}, "training.learning_rate: input should be a finite number"),
        ({"batch_size": 1, "inner": {"hidden_size": 0}}, "training.inner.hidden_size: input should be greater than 0"),
        ({"batch_size": 1, "inner": {"paths": [3]}}, "training.inner.paths.0"),
        ({"batch_size": 1, "betas": [0.5]}, "training.betas"),
        ({"batch_size": 13}, "training: batch_size must not be unlucky"),
        ({"batch_size": "a", "learning_rate": "b"}, "1 more"),
        ([1, 2], "training must be a section with keys, not [1, 2]"),
    ],
)
def test_a_wrong_setting_is_named_in_one_sentence(mapping: Any, says: str) -> None:
    assert says in error_of(Section.parse, mapping, "training")


def test_a_misspelt_key_is_told_before_the_missing_one_it_stood_for() -> None:
    assert error_of(Section.parse, {"batch_sise": 3}, "").startswith("batch_sise is not a known setting")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("batchsize", "batch_size"), ("BATCH-SIZE", "batch_size"), ("lerning_rate", "learning_rate"), ("qqq", None)],
)
def test_nearest(name: str, expected: str | None) -> None:
    assert nearest(name, ["batch_size", "learning_rate"]) == expected


_plain_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12).filter(lambda text: "$" not in text)
_leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _plain_text
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_plain_text, inner, max_size=3)
)


@given(st.dictionaries(_plain_text, _values, max_size=4))
def test_what_dump_writes_load_reads(tmp_path_factory: pytest.TempPathFactory, mapping: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    dump_yaml(mapping, path)
    assert load_yaml(path) == mapping


def test_dumped_settings_parse_to_themselves(tmp_path: Path) -> None:
    section = Section(batch_size=3, learning_rate=1e-5, inner=Inner(paths=["数据/*.jsonl", "1e-3", "yes"]))
    dump_yaml(section, tmp_path / "c.yaml")
    assert Section.parse(load_yaml(tmp_path / "c.yaml")) == section
    assert (tmp_path / "c.yaml").read_text(encoding="utf-8").startswith("batch_size: 3\nlearning_rate: 1.0e-05\n")
