"""A whole run with the default settings on a text that lies here: its losses, rates and gates, kept in `golden_run`.

After a change that is meant to change them: `python tests/train/test_golden_run.py` writes the new ones.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch

import fusiontree
from fusiontree.train.settings import RunSettings

FOLDER = Path(__file__).with_name("golden_run")
GOLDEN = FOLDER / "metrics.json"
SMALL = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 64, "mamba_head_dim": 16}
SMALL |= {"mamba_state_size": 16, "gate_rank": 8, "srte_rank": 8}
COLUMNS = ("lm_loss", "lr", "grad_norm", "gate_mean", "tokens", "eval_loss")


def metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of a run of some steps: all settings the default ones, but for sizes and what depends on the machine."""
    torch.set_num_threads(1)
    settings = RunSettings.parse(
        {
            "model": SMALL,
            "data": {
                "train_paths": str(FOLDER / "train.jsonl"),
                "eval_paths": str(FOLDER / "eval.jsonl"),
                "tokenizer": str(FOLDER / "tokenizer"),
                "cache_dir": str(folder / "cache"),
            },
            "training": {"max_steps": 12, "eval_interval": 6, "log_interval": 1, "mixed_precision": "no"},
            "system": {"device": "cpu"},
            "output_dir": str(folder / "run"),
        }
    )
    run = fusiontree.train(settings).run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{column: row[column] for column in COLUMNS if column in row} for row in rows]


def test_a_run_with_the_default_settings_goes_as_it_went(tmp_path: Path) -> None:
    found, golden = metrics(tmp_path), json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(found) == len(golden) and {column for row in golden for column in row} == set(COLUMNS)
    for row, (mine, theirs) in enumerate(zip(found, golden, strict=True)):
        assert mine == pytest.approx(theirs, rel=1e-4), f"row {row}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(json.dumps(metrics(Path(folder)), indent=1) + "\n", encoding="utf-8")
