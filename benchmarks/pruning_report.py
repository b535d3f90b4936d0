"""The tables of `pruning.py`, from its records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import records

from fusiontree.eval.gate_guide import rank_correlation

Runs = list[dict[str, Any]]


def report(path: Path) -> str:
    """All tables, saved beside the records as Markdown."""
    runs = records.recorded_runs(path)
    found = {stage: [r for r in runs if r["run"]["stage"] == stage] for stage in {r["run"]["stage"] for r in runs}}
    first = runs[0]["run"]
    parts = [
        f"# Pruning: {first['size']}, {first['steps']} steps of {first['batch_size']} x {first['length']} tokens, "
        f"{first['dtype']}{_documents(first)}{_seed(first)}\n",
        "Loss in nats per token of the test file; recall is the share of answers found and, in brackets, their loss "
        "per token: needle / value of a list / copy. Layers: B both, M Mamba, A attention, – neither; then how many "
        "single heads are cut and gates frozen. A fine plan takes heads and gates too, and its export merges maps.\n",
    ]
    parent = next(iter(found.get("parent", [])), None)
    if parent is not None:
        parts += ["## What the branches are worth\n", _worth(parent)]
    if "criteria" in found:
        parts += ["## Criteria at equal saving, before healing\n", _criteria(found["criteria"], parent)]
    if "frontier" in found:
        parts += ["## The frontier\n", _frontier(found["frontier"], parent)]
    if "heal" in found:
        parts += ["## Healing and its rivals\n", _heal(found["heal"], parent)]
    if "difference" in found:
        parts += ["## Against the healed cut, on the same text\n", _differences(found["difference"])]
    if "commit" in found:
        parts += ["## Gates that commit in the last steps\n", _other_parents(found["commit"], parent)]
    if "recall" in found:
        parts += ["## Criteria on a parent that was taught to look things up; recall is that of MQAR\n"]
        parts += [_other_parents(found["recall"], found["recall"][0])]
    if "costs" in found:
        parts += ["## Measured in one run, against the parent\n", _costs(found["costs"][-1]["costs"])]
    parts.append(records.origin(runs))
    text = "\n".join(parts)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _documents(run: dict[str, Any]) -> str:
    if "section" not in run:
        return ""
    beginnings = f" and as many of {run['beginning']}" if run["beginning"] else ""
    return (
        f"; documents of {run['section']} characters{beginnings}, tasks in {100 * run['task_prob']:.0f} % of each kind"
    )


def _seed(run: dict[str, Any]) -> str:
    return f"; seed {run['training_seed']}" if "training_seed" in run else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _worth(parent: dict[str, Any]) -> str:
    rises = [rise for layer in parent["rise"] for rise in layer]
    gates = [weight for mean in parent["gate_mean"] for weight in (mean, 1 - mean)]
    shares = [share for layer in parent["contribution"] for share in layer]
    rows = [
        [str(layer), f"{gate:.3f}", f"{rise[0]:+.4f}", f"{share[0]:.2f}", f"{rise[1]:+.4f}", f"{share[1]:.2f}"]
        for layer, (gate, rise, share) in enumerate(
            zip(parent["gate_mean"], parent["rise"], parent["contribution"], strict=True)
        )
    ]
    head = ["layer", "gate", "loss without Mamba", "its contribution", "loss without attention", "its contribution"]
    every = ", ".join(f"{name} {rise:+.3f}" for name, rise in parent["all_of_one"].items())
    return (
        _table(head, rows)
        + f"\nRank correlation with the rise of the loss: gate weight {rank_correlation(gates, rises):+.2f}, "
        f"contribution {rank_correlation(shares, rises):+.2f}. Loss without a branch in every layer: {every}.\n"
    )


def _quality(run: dict[str, Any], parent: dict[str, Any] | None) -> list[str]:
    recall = " / ".join(f"{100 * right:.0f} % ({loss:.2f})" for right, loss in run["recall"].values()) or "–"
    against = "" if parent is None else f" ({100 * (run['loss'] / parent['loss'] - 1):+.1f} %)"
    return [f"{run['parameters'] / 1e6:.2f} M", f"{run['loss']:.4f}{against}", recall]


def _title(run: dict[str, Any]) -> str:
    """The rule's name; the seed only of what is drawn."""
    seed = f" {run['seed']}" if run["criterion"] == "random" else ""
    return (
        run["criterion"] + seed + (", fine" if run["fine"] else "") + (", empty layers" if run["empty_layers"] else "")
    )


def _kept(figures: dict[str, Any]) -> str:
    return f"{figures['layers']} {figures['heads_cut']} {figures['gates_frozen']}"


def _criteria(runs: Runs, parent: dict[str, Any] | None) -> str:
    rows = [[_title(r["run"]), _kept(r), *_quality(r, parent)] for r in runs]
    own = [] if parent is None else [["the parent", "B" * len(parent["rise"]) + " 0 0", *_quality(parent, None)]]
    return _table(["criterion", "layers", "parameters", "loss", "recall"], own + rows)


def _frontier(runs: Runs, parent: dict[str, Any] | None) -> str:
    healed = {(_title(r["run"]), r["run"]["decode"]): r["loss"] for r in runs if r["run"].get("healed")}
    rows = []
    for r in (r for r in runs if not r["run"].get("healed")):
        rule, decode = _title(r["run"]), r["run"]["decode"]
        if "impossible" in r:
            rows.append([rule, f"{decode:g}x", "impossible", "–", "–", "–", "–"])
            continue
        after = f"{healed[rule, decode]:.4f}" if (rule, decode) in healed else "–"
        rows.append([rule, f"{decode:g}x", _kept(r), *_quality(r, parent), after])
    return _table(["plan", "decode", "layers", "parameters", "loss", "recall", "loss after healing"], rows)


def _heal(runs: Runs, parent: dict[str, Any] | None) -> str:
    rows = []
    for r in runs:
        name = f"healed: {_title(r['run'])}" if "criterion" in r["run"] else r["run"]["model"]
        by_position = ", ".join(f"{loss:.3f}" for _, loss in r["by_position"])
        rows.append([name, *_quality(r, parent), by_position])
    own = [] if parent is None else [["the parent", *_quality(parent, None), ""]]
    return _table(["model", "parameters", "loss", "recall", "loss by position"], own + rows)


def _differences(runs: Runs) -> str:
    rows = [
        [
            r["run"]["model"],
            f"{r['difference']:+.4f} ± {r['standard_error']:.4f}",
            f"{100 * r['difference'] / r['cut_loss']:+.2f} %",
        ]
        for r in runs
    ]
    blocks = (
        f"\nStandard errors from {runs[0]['blocks']} blocks of neighbouring documents, {runs[0]['tokens']:,} tokens.\n"
    )
    return _table(["model", "loss above the cut's, nats per token", "share of it"], rows) + blocks


def _other_parents(runs: Runs, parent: dict[str, Any] | None) -> str:
    rows = []
    for r in runs:
        gates = ", ".join(
            f"{m:.2f} ± {s:.2f}" for m, s in zip(r.get("gate_mean", []), r.get("gate_std", []), strict=True)
        )
        cut = f"{_title(r['run'])}: {_kept(r)}" if "criterion" in r["run"] else "–"
        rows.append([r["run"]["model"], cut, *_quality(r, parent), gates or "–"])
    return _table(["the parent", "cut by", "parameters", "loss", "recall", "gates, by layer"], rows)


def _costs(costs: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            name,
            f"{c['decode']:.2f}x",
            f"{c['prefill']:.2f}x",
            f"{c['memory']:.2f}x",
            f"{1e3 * c['decode_seconds']:.2f}",
            f"{c['weight_bytes'] / 1e6:.1f}",
            f"{c['state_bytes'] / 1e6:.2f}",
        ]
        for name, c in costs.items()
    ]
    return _table(["model", "decode", "prefill", "memory", "ms per token", "weights, MB", "state, MB"], rows)
