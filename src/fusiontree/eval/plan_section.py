"""Prune plans on the page that compares models: what was cut or would be, why, and how good a guide the gates are."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fusiontree.artifacts import PrunePlan
from fusiontree.eval.columns import Column
from fusiontree.eval.gate_guide import gate_guide
from fusiontree.eval.page import section
from fusiontree.eval.roles import cut_from
from fusiontree.eval.tables import note


def plan_section(columns: Sequence[Column]) -> str:
    parts: list[str] = []
    exports: list[bool] = []
    for column in columns:
        plan = column.plan
        if plan is None:
            continue
        cells = "".join(
            f'<li class="{layer.keep}" title="{escape(layer.reason)}">{index}</li>'
            for index, layer in enumerate(plan.layers)
        )
        kept = {kind: plan.layer_branches.count(kind) for kind in ("both", "mamba", "attention", "constant")}
        counts = ", ".join(f"{count} {kind}" for kind, count in kept.items() if count)
        if heads := sum(layer.num_heads_removed for layer in plan.layers):
            counts += f"; {heads} single heads cut"
        if gates := sum(layer.gate is not None for layer in plan.layers):
            counts += f"; {gates} gates frozen"
        reasons = "".join(
            f"<tr><td>{index}</td><td>{escape(layer.keep)}</td><td>{escape(layer.reason)}</td><td>"
            f"{', '.join(f'{escape(name)} {value:.4g}' for name, value in layer.evidence.items())}</td></tr>"
            for index, layer in enumerate(plan.layers)
        )
        thresholds = ", ".join(f"{escape(name)} {value:g}" for name, value in plan.thresholds.items())
        is_done = cut_from(column) is not None
        exports.append(is_done)
        parts.append(
            f"<h3>{escape(column.name)}</h3><p>{'Was' if is_done else 'Would be'} pruned by {escape(plan.criterion)}"
            f"{f' ({thresholds})' if thresholds else ''}{'' if plan.step is None else f', at step {plan.step:,}'}: "
            f"{counts}.</p>"
            f'<ol class="branches">{cells}</ol>{_guide(plan)}<details><summary>Why, layer by layer</summary>'
            f'<div class="wide"><table><tr><th>layer</th><th>keeps</th><th>reason</th><th>evidence</th></tr>{reasons}'
            "</table></div></details>"
        )
    if not parts:
        return ""
    text = (
        "From prune_plan.json: a layer keeps both branches, Mamba alone (red), attention alone (blue) or neither "
        "(dashed): one constant vector. The plan of a run is what it would be pruned by, that of an export what it was."
    )
    title = "What was and what would be pruned"
    if len(set(exports)) == 1:
        title = "What was pruned" if exports[0] else "What would be pruned"
    return section(title, "".join(parts) + note(text))


def _guide(plan: PrunePlan) -> str:
    guide = gate_guide(plan)
    return note(f"{guide[0].upper()}{guide[1:]}.") if guide else ""
