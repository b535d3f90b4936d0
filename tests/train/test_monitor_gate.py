"""Gate records against the gates themselves, and the plan that thresholds draw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fusiontree
from fusiontree.artifacts import GateStatistics
from fusiontree.models.gate_stats import HISTOGRAM_BINS, GateDetails
from fusiontree.train.monitor_gate import GateMonitor, histogram_quantiles, mean_gate
from fusiontree.train.settings import GateMonitorSettings

CHANNELS = 6


def details(gates: list[torch.Tensor | None]) -> GateDetails:
    """The sums of gates [tokens, CHANNELS] per layer; None is a layer that did not run both branches."""
    rows = []
    for gate in gates:
        gate = torch.empty(0, CHANNELS) if gate is None else gate
        entropy = torch.distributions.Bernoulli(gate).entropy() if len(gate) else gate
        rows.append(
            {
                "tokens": torch.tensor(float(len(gate))),
                "channel_sum": gate.sum(0),
                "channel_square_sum": gate.square().sum(0),
                "histogram": torch.histc(gate, HISTOGRAM_BINS, 0, 1),
                "entropy_sum": entropy.mean(1).sum() if len(gate) else torch.tensor(0.0),
                "mamba_norm_sum": torch.tensor(2.0 * len(gate)),
                "attention_norm_sum": torch.tensor(3.0 * len(gate)),
                "mamba_sum": torch.full((CHANNELS,), 0.25 * len(gate)),
                "attention_sum": torch.full((CHANNELS,), 0.5 * len(gate)),
            }
        )
    return GateDetails(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def monitor(**settings: object) -> GateMonitor:
    return GateMonitor(GateMonitorSettings(**settings), 3, ["both", "both", "mamba"])


def test_a_record_describes_the_gates_of_all_micro_batches() -> None:
    torch.manual_seed(0)
    gates = [torch.rand(400, CHANNELS) ** 2, torch.rand(400, CHANNELS) * 0.02 + 0.97]
    watch = monitor()
    for part in (slice(0, 150), slice(150, 400)):
        watch.update(details([gates[0][part], gates[1][part], None]))
    record = watch.record(step=7, tokens=400, tokens_seen=2800)
    assert (record.step, record.tokens, record.tokens_seen) == (7, 400, 2800)
    first, second, third = record.layers
    for layer, gate in ((first, gates[0]), (second, gates[1])):
        assert layer.tokens == 400
        assert layer.mean == pytest.approx(gate.mean().item(), abs=1e-5)
        assert layer.std == pytest.approx(gate.std(correction=0).item(), abs=1e-4)
        assert layer.quantiles == pytest.approx(
            torch.quantile(gate.flatten(), torch.tensor(record.quantile_levels)), abs=0.01
        )
        assert layer.entropy == pytest.approx(torch.distributions.Bernoulli(gate).entropy().mean().item(), abs=1e-5)
        assert layer.saturation == pytest.approx(((gate < 0.05) | (gate >= 0.95)).float().mean().item(), abs=1e-4)
        assert layer.channel_mean == pytest.approx(gate.mean(0).tolist(), abs=6e-4)
        assert sum(layer.histogram) == pytest.approx(1, abs=1e-3)
        assert (layer.mamba_norm, layer.attention_norm) == (2.0, 3.0)
    assert (third.branches, third.tokens, third.histogram) == ("mamba", 0, [])
    means = [gates[0].mean().item(), gates[1].mean().item()]
    assert mean_gate(record)[0] == pytest.approx(sum(means) / 2, abs=1e-5)
    # A record is a line of gates.jsonl and comes back as it was.
    assert GateStatistics.loads(record.dumps(), source="test").dumps() == record.dumps()


def test_the_next_record_starts_from_nothing() -> None:
    watch = monitor()
    watch.update(details([torch.full((9, CHANNELS), 0.9), torch.full((9, CHANNELS), 0.9), None]))
    watch.record(1, 9, 9)
    watch.update(details([torch.full((5, CHANNELS), 0.25), torch.full((5, CHANNELS), 0.25), None]))
    assert watch.record(2, 5, 14).layers[0].mean == pytest.approx(0.25)


def test_quantiles_of_a_histogram_are_linear_inside_a_bin() -> None:
    assert histogram_quantiles([0.0, 1.0, 0.0, 1.0], (0.25, 0.5, 0.75, 1.0)) == [0.375, 0.5, 0.875, 1.0]


def watch_means(watch: GateMonitor, step: int, *means: float) -> None:
    watch.update(details([torch.full((4, CHANNELS), mean) for mean in means] + [None]))
    watch.record(step, 4, 4 * step)


def test_thresholds_decide_on_the_mean_of_the_last_records() -> None:
    watch = monitor(plan_records=2, plan_min_steps=20)
    watch_means(watch, 10, 0.1, 0.1)  # forgotten: only two records count
    watch_means(watch, 20, 0.78, 0.3)
    watch_means(watch, 30, 0.86, 0.05)
    plan = watch.plan("runs/x")
    assert plan.layer_branches == ["mamba", "attention", "mamba"]
    assert plan.layers[0].evidence["gate_mean"] == pytest.approx(0.82, abs=1e-4)
    assert plan.layers[2].reason == "has one branch already"
    # What the branch that goes said on average.
    assert [layer.constant for layer in plan.layers] == [[0.5] * CHANNELS, [0.25] * CHANNELS, None]
    assert plan.thresholds["mamba"] == 0.8 and plan.thresholds["attention"] == 0.2
    assert (plan.step, plan.source) == (30, "runs/x")


def test_nothing_is_cut_between_the_thresholds_or_too_early() -> None:
    watch = monitor(plan_min_steps=20)
    assert watch.plan("x").layer_branches == ["both", "both", "mamba"]
    watch_means(watch, 10, 0.95, 0.5)
    assert watch.plan("x").layer_branches == ["both", "both", "mamba"]
    assert "too early" in watch.plan("x").layers[0].reason
    watch_means(watch, 20, 0.95, 0.5)
    assert watch.plan("x").layer_branches == ["mamba", "both", "mamba"]


def test_a_gate_that_is_spread_out_is_not_cut() -> None:
    """A mean of 0.891 with a standard deviation of 0.297: some tokens need the other branch."""
    gate = torch.tensor([0.99] * 9 + [0.0])[:, None].expand(-1, CHANNELS)
    for max_std, wanted in ((0.25, "both"), (0.3, "mamba")):
        watch = monitor(plan_min_steps=0, plan_max_std=max_std)
        watch.update(details([gate, gate, None]))
        watch.record(1, 10, 10)
        first = watch.plan("x").layers[0]
        assert first.keep == wanted and first.evidence["gate_std"] == pytest.approx(0.297, abs=1e-3)
        assert ("standard deviation is above 0.25" in first.reason) == (wanted == "both")


def test_a_mean_that_few_records_bear_out_cuts_nothing() -> None:
    for confidence, wanted in ((0.7, "both"), (0.6, "mamba")):
        watch = monitor(plan_min_steps=0, plan_records=3, plan_confidence=confidence)
        for step, mean in enumerate((0.99, 0.99, 0.5), 1):
            watch_means(watch, step, mean, 0.5)
        first = watch.plan("x").layers[0]
        assert first.keep == wanted and first.evidence["confidence"] == pytest.approx(2 / 3)
        assert ("in 2 of 3 records only" in first.reason) == (wanted == "both")


def test_a_run_writes_its_plan_only_where_that_is_asked_for(run_settings, tmp_path: Path) -> None:
    for wanted in (True, False):
        run = tmp_path / str(wanted)
        training = {"max_steps": 1, "eval_interval": 0}
        fusiontree.train(run_settings(training=training, gate_monitor={"export_plan": wanted}, output_dir=str(run)))
        assert (run / "gates.jsonl").exists() and (run / "prune_plan.json").exists() == wanted


def test_a_monitor_goes_on_from_its_state() -> None:
    first, second = monitor(plan_min_steps=0), monitor(plan_min_steps=0)
    watch_means(first, 10, 0.9, 0.5)
    second.load_state_dict(first.state_dict())
    for watch in (first, second):
        watch_means(watch, 20, 0.6, 0.1)
    assert first.plan("x") == second.plan("x")
    assert first.state_dict() == second.state_dict()


def test_the_first_step_and_every_interval_are_recorded() -> None:
    assert [step for step in range(1, 10) if monitor(interval=4).due(step)] == [1, 4, 8]
    assert not monitor(enabled=False).due(1)
