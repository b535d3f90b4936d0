"""What all records share: one JSON file with its kind and version, checked when it is read."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError
from typing_extensions import Self

from fusiontree.atomic import atomic_write
from fusiontree.errors import InputError
from fusiontree.version import __version__

CORE_LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "accelerate", "numpy")


class Record(BaseModel):
    model_config = ConfigDict(
        extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True, protected_namespaces=()
    )


class Artifact(Record):
    """Base of the records. A subclass names its `KIND`, and raises `VERSION` when old readers would misread it."""

    KIND: ClassVar[str]
    VERSION: ClassVar[int] = 1

    def dumps(self, indent: int | None = None) -> str:
        """The record as JSON text, on one line unless `indent` is given, without a newline at its end."""
        head = {"kind": self.KIND, "version": self.VERSION}
        return json.dumps(head | json.loads(self.model_dump_json()), ensure_ascii=False, indent=indent)

    @classmethod
    def loads(cls, text: str | bytes, source: str) -> Self:
        """Reads a record from JSON text.

        Args:
            text: what `dumps` gave.
            source: where it came from (`FILE` or `FILE:LINE`), for messages.

        Raises:
            InputError: truncated or otherwise not JSON, a record of another kind, of a newer version, or with fields
                that do not fit.
        """
        noun = cls.KIND.replace("_", " ")
        try:
            content = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{source} is truncated or not JSON ({error}); it should hold the {noun}") from error
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind != cls.KIND:
            found = repr(kind) if isinstance(kind, str) else "something else"
            raise InputError(f"{source} holds {found} where {cls.KIND!r} is needed")
        version = content.get("version")
        if not isinstance(version, int) or version < 1:
            raise InputError(f"{source} does not say the version of its format; so the {noun} is not whole")
        if version > cls.VERSION:
            raise InputError(
                f"{source} was written by a newer FusionTree (format {version}, this one reads up to {cls.VERSION}); "
                "upgrade FusionTree to read it"
            )
        fields = {name: value for name, value in content.items() if name not in ("kind", "version")}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            key = ".".join(str(part) for part in detail["loc"])
            raise InputError(f"{source} does not fit as {noun}: {key}: {detail['msg'].lower()}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record to `path` atomically (see `atomic_write`)."""
        atomic_write(path, self.dumps(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a record that `save` wrote; raises `InputError` as `loads` does, and when there is no such file."""
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist; it should hold the {cls.KIND.replace('_', ' ')}") from error
        except (IsADirectoryError, PermissionError) as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        return cls.loads(content, source=str(path))


def library_versions(names: Sequence[str] = CORE_LIBRARIES) -> dict[str, str]:
    """Installed versions of FusionTree, Python and those of the distributions `names` that are there."""
    versions = {"fusiontree": __version__, "python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
