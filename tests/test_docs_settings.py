"""The tables of settings in docs/ name every key of the code, no other, and the defaults that the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fusiontree.models import HybridLanguageModelConfig
from fusiontree.train.settings import RunSettings

DOCS = Path(__file__).parents[1] / "docs"
SECTIONS = [name for name in RunSettings.model_fields if name not in ("model", "output_dir", "seed")]


def documented(page: str, heading: str) -> dict[str, Any]:
    """Key -> default of the table behind a heading; the defaults are written as in YAML."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, _, behind = text.partition(f"\n{heading}\n")
    found = {}
    for keys, default in re.findall(r"^\| (`[^|]+`) \| `([^|]*)` \|", re.split(r"\n##+ ", behind)[0], re.M):
        value = OmegaConf.to_container(OmegaConf.create(f"value: {default}"))["value"]
        found |= dict.fromkeys(re.findall(r"`([^`]+)`", keys), value)
    return found


@pytest.mark.parametrize("section", SECTIONS)
def test_sections(section):
    page, heading = ("data.md", "## Settings") if section == "data" else ("training.md", f"### `{section}`")
    defaults = getattr(RunSettings(), section).model_dump(mode="json")
    assert documented(page, heading) == defaults


def test_model_fields():
    # Read from the class: an instance has None replaced by what it stands for.
    fields = {name: getattr(HybridLanguageModelConfig, name) for name in HybridLanguageModelConfig.__annotations__}
    assert documented("training.md", "### `model`") == fields
