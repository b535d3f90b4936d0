"""The files that tasks of lm-evaluation-harness in a folder are made of, read from their YAML alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fusiontree.data.corpus import matching_paths


class _Loader(yaml.SafeLoader):
    """Tags, such as `!function`, stand for nothing here: what they name is not run."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def task_files(folder: Path) -> list[Path]:
    """All files in the folder, what its task files include from elsewhere, and their data on this machine.

    Data are what `data_files` and `data_dir` name, from the working directory as `datasets` does, and the folder or
    file that is a `dataset_path`. A task file that cannot be read stands for itself alone.
    """
    found = dict.fromkeys(file for file in sorted(folder.rglob("*")) if file.is_file())
    waiting = [file for file in found if file.suffix in (".yaml", ".yml")]
    while waiting:
        file = waiting.pop()
        for name, value in _entries(_contents(file)):
            if name == "include":
                included = [file.parent / path for path in _strings(value)]
                waiting += [path for path in included if path.is_file() and path not in found]
                found |= dict.fromkeys(path for path in included if path.is_file())
            elif name in ("data_files", "data_dir", "dataset_path"):
                matches = (match for path in _strings(value) for match in sorted(matching_paths(path)))
                found |= dict.fromkeys(map(Path, matches))
    return list(found)


def _contents(file: Path) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _entries(value: Any) -> Iterator[tuple[Any, Any]]:
    """The entries of all dictionaries in a value."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield name, inner
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)


def _strings(value: Any) -> list[str]:
    """All texts in a value, of lists and dictionaries too."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _strings(one)]
