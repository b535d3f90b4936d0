"""Each term of the loss in the training engine: it reaches the gates, and its coefficient does what the docs say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import fusiontree
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.settings import RunSettings
from fusiontree.train.step import fetch
from tiny_models import TINY, save_tiny_model

TARGET = 0.4


@pytest.fixture(scope="module")
def decided(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gates have left one half, in all directions."""
    return save_tiny_model(tmp_path_factory.mktemp("decided") / "model", corpus / "tokenizer")


@pytest.fixture(scope="module")
def sections(run_settings, decided: Path, tmp_path_factory) -> Callable[..., dict[str, Any]]:
    directory = tmp_path_factory.mktemp("terms")

    def build(name: str, **changes: Any) -> dict[str, Any]:
        training = {"eval_interval": 0, "save_interval": 0, "init_from": str(decided), "max_steps": 25}
        training |= {"gradient_accumulation_steps": 1, "learning_rate": 1e-2} | changes.pop("training", {})
        shutil.rmtree(directory / name, ignore_errors=True)
        return run_settings(model=TINY, training=training, output_dir=str(directory / name), **changes)

    return build


def gate_gradients(sections: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Of the first step of a run."""
    engine = TrainingEngine(RunSettings.parse(sections))
    micro_batches, totals = fetch(iter(engine.train_loader), 1, engine.processes)
    engine.gradients(1, micro_batches, totals, with_details=False)
    return {name: gradient.clone() for name, gradient in engine.parallel.gradients() if ".gate." in name}


@pytest.mark.parametrize("term", ["lm", "load_balance", "entropy", "distillation"])
def test_every_term_reaches_every_gate(sections, decided: Path, term: str) -> None:
    others = {"load_balance_coeff": 0.0, "entropy_reg_coeff": 0.0, "gate_margin": 0.0, "gate_target": TARGET}
    coefficients = {
        "load_balance": {"load_balance_coeff": 1.0},
        "entropy": {"entropy_reg_coeff": 1.0},
        # Of a model that begins with other weights: distilled from itself a model has nothing to learn.
        "distillation": {"distillation_coeff": 1.0, "teacher": str(decided)},
    }
    student = {"init_from": None} if term == "distillation" else {}
    without = gate_gradients(sections("without", loss=others, training=student))
    found = without
    if term != "lm":
        with_term = gate_gradients(sections("with", loss=others | coefficients[term], training=student))
        found = {name: with_term[name] - gradient for name, gradient in without.items()}
    assert len(found) == 2 * TINY["num_layers"]
    for name, gradient in found.items():
        # A gate begins with its second matrix at zero, through which the first one hears nothing.
        if term == "distillation" and name.endswith("up.weight"):
            continue
        assert gradient.abs().max() > 1e-6, name


def last_gates(sections: dict[str, Any]) -> dict[str, float]:
    """Of the last step of a run, averaged over layers: entropy, standard deviation, saturation, |mean - target|."""
    fusiontree.train(sections)
    *_, last = (Path(sections["output_dir"]) / "gates.jsonl").read_text().splitlines()
    layers = json.loads(last)["layers"]
    found = {name: fmean(layer[name] for layer in layers) for name in ("entropy", "std", "saturation")}
    return found | {"distance": fmean(abs(layer["mean"] - TARGET) for layer in layers)}


def test_a_larger_entropy_coefficient_keeps_the_gates_undecided(sections) -> None:
    """So it is no remedy for gates that stay at one half."""
    runs = [
        last_gates(
            sections(
                "entropy",
                training={"max_steps": 80},
                loss={"entropy_reg_coeff": value, "load_balance_coeff": 0.0},
                gate_monitor={"interval": 5},
            )
        )
        for value in (0.0, 0.3, 3.0)
    ]
    entropies, deviations = ([run[name] for run in runs] for name in ("entropy", "std"))
    assert entropies[0] + 0.01 < entropies[1] < entropies[2] - 0.02, entropies
    assert deviations[0] > deviations[1] > deviations[2], deviations


def test_a_larger_load_balance_coefficient_brings_the_means_to_the_target(sections) -> None:
    """So lowering it is no remedy for gates that run to the ends."""
    loss = {"gate_target": TARGET, "gate_margin": 0.0, "entropy_reg_coeff": 0.0}
    runs = [
        last_gates(
            sections(
                "balance",
                training={"max_steps": 80},
                loss=loss | {"load_balance_coeff": value},
                gate_monitor={"interval": 5},
            )
        )
        for value in (0.0, 0.3, 3.0)
    ]
    distances = [run["distance"] for run in runs]
    assert distances[0] > distances[1] + 0.01 > distances[2] + 0.01, distances
    assert distances[2] < 0.5 * distances[0], distances
