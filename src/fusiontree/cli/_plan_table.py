"""A prune plan as a table: layers x branches, and under a layer the heads that were offered and taken."""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusiontree.artifacts import Branch, LayerDecision, PrunePlan

_BRANCHES: tuple[Branch, ...] = ("mamba", "attention")
#: The names of evidence about heads, by branch.
_HEADS: dict[Branch, tuple[str, ...]] = {"mamba": ("mamba_heads",), "attention": ("local_heads", "global_heads")}
_EMPTY = ["", "", ""]


def draw(made: PrunePlan) -> None:
    """Prints per layer what the gate gives each branch, the rise of the loss without it, and what that saves."""
    from rich.console import Console
    from rich.table import Table

    from fusiontree.eval.gate_guide import gate_guide

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    table = Table(title=f"Prune plan by {made.criterion}, for {made.source}")
    table.add_column("layer", justify="right")
    table.add_column("gate", justify="right")
    for branch in _BRANCHES:
        for title in (branch, "Δloss", "saves"):
            table.add_column(title, justify="left" if title == branch else "right")
    table.add_column("because")
    has_heads = False
    for index, layer in enumerate(made.layers):
        gate = _number(layer.evidence.get("gate_mean"))
        frozen = "frozen" if gate == "–" else f"{gate} frozen"
        cells = [cell for branch in _BRANCHES for cell in _branch_cells(made, index, layer, branch)]
        table.add_row(str(index), gate if layer.gate is None else frozen, *cells, layer.reason)
        for pair in zip_longest(*(_head_cells(made, index, layer, branch) for branch in _BRANCHES), fillvalue=_EMPTY):
            table.add_row("", "", *(cell for cells in pair for cell in cells), "")
            has_heads = True
    console.print(table)
    print("gate: 1 = Mamba, 0 = attention, frozen: a constant; Δloss: nats without the branch alone, or (in brackets)")
    print("after its step, with all before it; saves: share of the parent's cost")
    if has_heads:
        print("heads: offered, with figures of those that would go first, and those that went (−)")
    if guide := gate_guide(made):
        print(guide)


def _branch_cells(made: PrunePlan, index: int, layer: LayerDecision, branch: Branch) -> list[str]:
    evidence = layer.evidence
    # Plans by thresholds know of no savings; a gate, or one constant beside a branch, is of a layer that had both.
    had_both = "gate_mean" in evidence or (layer.constant is not None and layer.keep != "constant")
    is_kept = layer.keep in ("both", branch)
    state = "kept" if is_kept else "cut" if had_both or f"{branch}_saving" in evidence else "–"
    steps = [step.loss_increase for step in made.steps if (step.layer, step.branch) == (index, branch)]
    rise = evidence.get(f"{branch}_ablation", evidence.get(f"{branch}_recall"))
    after = f"({steps[-1]:+.4f})" if steps and not is_kept else "–"
    return [state, after if rise is None else _number(rise, "+.4f"), _share(evidence.get(f"{branch}_saving"))]


def _head_cells(made: PrunePlan, index: int, layer: LayerDecision, branch: Branch) -> list[list[str]]:
    cells = []
    for name in _HEADS[branch]:
        rise = layer.evidence.get(f"{name}_ablation", layer.evidence.get(f"{name}_recall"))
        if rise is not None:
            saving = _share(layer.evidence.get(f"{name}_saving"))
            cells.append([f"  {name.replace('_', ' ')}", _number(rise, "+.4f"), saving])
    if removed := layer.heads.get(branch):
        steps = [step for step in made.steps if (step.layer, step.branch) == (index, branch) and step.heads]
        after = f"({steps[-1].loss_increase:+.4f})" if steps else "–"
        cells.append([f"  −{len(removed)} heads", after, "–"])
    return cells


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"
