"""YAML files and dotted overrides, read into frozen, validated settings.

    mapping = apply_overrides(load_yaml("configs/quickstart.yaml"), ["training.batch_size=4"])
    settings = TrainingSettings.parse(mapping["training"], where="training")

`Settings` is the base of every settings section; the sections themselves live beside the code that they steer.
"""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails
from typing_extensions import Self

from fusiontree.atomic import atomic_write
from fusiontree.errors import InputError, SettingError, first_line, nearest

__all__ = ["InputError", "Settings", "apply_overrides", "dump_yaml", "load_yaml", "nearest", "place_in_yaml"]


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Interpolations such as `${training.batch_size}` are left as written, so that overrides still reach them;
    `apply_overrides` resolves them.

    Raises:
        InputError: the file is missing, unreadable, not UTF-8, not valid YAML (repeated keys included), not a mapping.
    """
    path = Path(path)
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError as error:
        raise InputError(f"config file {path} does not exist") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"config file {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise InputError(f"config file {path}{yaml_fault(error)}") from error
    except OmegaConfBaseException as error:
        raise InputError(f"config file {path}: {first_line(error)}") from error
    if not isinstance(content, dict) or any(not isinstance(key, str) for key in content):
        raise InputError(f"config file {path} must hold a mapping of named settings, such as `training:`")
    return typing.cast("dict[str, Any]", content)


def place_in_yaml(path: str | os.PathLike[str], key: str) -> str | None:
    """`FILE, line N` where a valid YAML file writes the dotted `key`; None where it does not.

    A key below what the file writes as a value (a list's item) is found at that value.
    """
    with open(path, encoding="utf-8") as file:
        node = yaml.compose(file, Loader=yaml.SafeLoader)
    line = None
    for part in key.split(".") if key else ():
        entries = node.value if isinstance(node, yaml.MappingNode) else ()
        found = next(((name, value) for name, value in entries if name.value == part), None)
        if found is None:
            break
        name, node = found
        line = name.start_mark.line + 1
    else:
        return f"{path}, line {line}" if line else None
    return f"{path}, line {line}" if line and not isinstance(node, yaml.MappingNode) else None


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets dotted keys in a copy of `mapping`, then resolves its interpolations.

    Args:
        mapping: nested settings, as `load_yaml` returns them; not changed.
        overrides: `"section.key=value"`; the value is read as YAML (`3e-4`, `true`, `null`, `[a, b]`), the last one of
            a key wins, and sections that do not exist yet are made.

    Raises:
        InputError: an override that is not `key=value`, a value that is not YAML, a key below something that is not a
            section, or an interpolation that leads nowhere.
    """
    config = OmegaConf.create(dict(mapping))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not all(part.strip() for part in key.split(".")):
            raise InputError(f"override {override!r} must look like section.key=value")
        try:
            config.merge_with_dotlist([override])
        except yaml.YAMLError as error:
            raise InputError(f"override {override!r} has a value that is not valid YAML: {_problem(error)}") from error
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            # omegaconf raises the latter two where a list stands in the way of a key.
            raise InputError(f"override {override!r} does not fit: {first_line(error)}") from error
    try:
        return typing.cast("dict[str, Any]", OmegaConf.to_container(config, resolve=True))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the settings"
        raise InputError(f"{key} cannot be resolved: {first_line(error)}") from error


def dump_yaml(obj: Settings | Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes settings so that `load_yaml` reads the same values back, keys in their order, in one atomic step.

    Raises:
        OSError: the file could not be written; an old one is untouched.
    """
    content = obj.model_dump(mode="json") if isinstance(obj, BaseModel) else dict(obj)
    atomic_write(path, OmegaConf.to_yaml(OmegaConf.create(content)))


class Settings(BaseModel):
    """The base of every settings section: immutable, unknown keys refused, infinities and NaN refused.

    Each field says what it is, units included, in its `description`.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        # pydantic would warn about fields called `model` or `model_...`, which are ordinary names here.
        protected_namespaces=(),
    )

    @classmethod
    def parse(cls, mapping: Mapping[str, Any] | None, where: str = "") -> Self:
        """Validates a section.

        Args:
            mapping: its keys and values; None (a YAML section without content) counts as empty.
            where: the section's dotted name, such as `training`, for messages; empty for the whole file.

        Raises:
            SettingError: an `InputError`: names the dotted key at fault, its value, and for an unknown key the nearest
                valid one.
        """
        if mapping is None:
            mapping = {}
        if not isinstance(mapping, Mapping):
            raise SettingError(f"{where or 'the configuration'} must be a section with keys, not {mapping!r}", where)
        try:
            return cls.model_validate(dict(mapping))
        except ValidationError as error:
            details = error.errors(include_url=False)
            # An unknown key explains a missing one (it is often the same, misspelt), so it comes first.
            details.sort(key=lambda detail: detail["type"] != "extra_forbidden")
            cause = details[0].get("ctx", {}).get("error")
            if isinstance(cause, SettingError):
                # A check across sections names the setting at fault by itself.
                key, sentence = cause.key, str(cause)
            else:
                key = _dotted(details[0], where)
                sentence = _explain(cls, details[0], where, key or "the configuration")
            if len(details) > 1:
                sentence += f" ({len(details) - 1} more of the settings here are wrong)"
            raise SettingError(sentence, key) from error


def _dotted(detail: ErrorDetails, where: str) -> str:
    path = [str(part) for part in detail["loc"]]
    return ".".join([where, *path] if where else path)


def _explain(cls: type[BaseModel], detail: ErrorDetails, where: str, key: str) -> str:
    path = [str(part) for part in detail["loc"]]
    kind, value = detail["type"], detail["input"]
    if kind == "extra_forbidden":
        owner = _section_at(cls, path[:-1])
        names = list(owner.model_fields) if owner else []
        close = nearest(path[-1], names)
        prefix = key.removesuffix(path[-1])
        if close is None and owner:
            close = next((f"{name}.{path[-1]}" for name in names if path[-1] in _fields_below(owner, name)), None)
        if close:
            return f"{key} is not a known setting; did you mean {prefix}{close}?"
        return f"{key} is not a known setting; known here: {', '.join(names) or 'none'}"
    if kind == "missing":
        return f"{key} is missing: give it a value"
    if kind in ("model_type", "model_attributes_type"):
        return f"{key} is a section: its settings are written below it, got {_shorten(repr(value))}"
    if kind in ("value_error", "assertion_error"):
        problem = str(detail.get("ctx", {}).get("error", detail["msg"]))
    else:
        problem = detail["msg"][:1].lower() + detail["msg"][1:]
    # A check across several fields sees the whole section: its message names the keys, the dump would only hide them.
    shown = "" if isinstance(value, Mapping) else f", got {_shorten(repr(value))}"
    return f"{key}: {problem}{shown}"


def _section_at(cls: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The settings class that a dotted path inside `cls` leads to; list positions and union tags lead nowhere new."""
    section = cls
    for name in path:
        if name in section.model_fields:
            inner = next(_settings_in(section.model_fields[name].annotation), None)
            if inner is None:
                return None
            section = inner
    return section


def _fields_below(cls: type[BaseModel], name: str) -> set[str]:
    """The settings of the section `name` of `cls`; none where it is no section."""
    section = _section_at(cls, [name])
    return set(section.model_fields) if section else set()


def _settings_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _settings_in(argument)


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or first_line(error))


def yaml_fault(error: yaml.YAMLError) -> str:
    """The rest of a sentence that begins with the name of a file: where that is no YAML, and why."""
    mark = getattr(error, "problem_mark", None)
    return f"{f', line {mark.line + 1}' if mark else ''} is not valid YAML: {_problem(error)}"
