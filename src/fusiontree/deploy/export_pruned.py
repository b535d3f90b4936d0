"""A prune plan carried out: a smaller model of the same class in a folder that `from_pretrained` reads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fusiontree.artifacts import LayerDecision, PrunePlan, RunManifest, atomic_directory
from fusiontree.deploy.costs import Cost, measure_costs
from fusiontree.deploy.folding import fold
from fusiontree.deploy.reference import check_plan, reference_parent
from fusiontree.errors import InputError, first_line
from fusiontree.models import HybridLanguageModel
from fusiontree.train.checkpoint import no_progress_bar

PLAN = "prune_plan.json"
CARD = "README.md"
CARD_HEADER = "---\nlibrary_name: fusiontree\npipeline_tag: text-generation\ntags: [fusiontree, pruned]\n---\n"
#: Of the largest logit, or of 1: how far an export in float32 may be from its parent with the plan's constants.
TOLERANCE = 1e-5
_PROBE_TOKENS = 64


def export(
    model: HybridLanguageModel,
    plan: PrunePlan,
    path: str | os.PathLike[str],
    *,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    parent: str | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> HybridLanguageModel:
    """Writes the model that the plan leaves, with tokenizer, manifest, plan and a model card.

    What became constant is folded into the weights around it in float64, so that the export equals
    `reference_parent(model, plan)`; in float32 that is checked before anything is written.

    Args:
        model: the parent, as `fusiontree.load` returns it; it stays as it is.
        plan: as `PrunePlan.load` returns it.
        path: of a directory that does not exist yet.
        merge: also multiply out linear maps that no one else reads between, see `fold`.
        dtype: of what is written; None: that of the parent.
        context: also time parent and export at this many tokens, for the card; None measures no time.
        parent: name of the parent for the manifest and the card; default: where it was loaded from.
        progress: called with what is done next.

    Returns:
        The exported model.

    Raises:
        InputError: the directory exists or cannot be written, the plan does not fit the model, or what it says cannot
            be folded without changing the model's predictions.
    """
    destination = Path(path)
    check_free(destination)
    check_plan(model, plan)
    parent = parent or str(model.name_or_path) or "unnamed"
    progress("folding")
    cut = fold(model, plan, merge)
    reference = reference_parent(model, plan)
    difference, largest = compare(reference, cut)
    if _multiplies_exactly(model.dtype) and not difference <= TOLERANCE * max(1.0, largest):
        raise InputError(
            f"the export would differ from its parent with the plan's constants in place by {difference:.2g} where the "
            f"largest logit is {largest:.3g}, more than rounding explains: a constant or a frozen gate is too extreme "
            "to be folded; make the plan again"
        )
    if dtype not in (None, model.dtype):
        cut.to(dtype)
        difference, largest = compare(reference, cut)
    costs = None
    if context is not None:
        costs = measure_costs({"parent": model, "export": cut}, context=context, progress=progress)
    settings: dict[str, Any] = {"plan": plan.model_dump(mode="json", exclude={"layers"})}
    if costs is not None:
        measured = {name: asdict(cost) for name, cost in costs.items()}
        settings["costs"] = {"context": context, "device": str(model.device), **measured}
    manifest = RunManifest.collect(settings, parent_run=parent)
    progress("writing")
    try:
        with atomic_directory(destination) as folder:
            with no_progress_bar():
                cut.save_pretrained(folder)
            if cut.tokenizer is not None:
                cut.tokenizer.save_pretrained(folder)
            manifest.save(folder / "manifest.json")
            plan.save(folder / PLAN)
            card = _card(destination, model, cut, plan, parent, context, costs, difference, largest)
            (folder / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise InputError(f"the export {destination} could not be written: {first_line(error)}") from error
    return cut


def check_free(destination: Path) -> None:
    """Raises InputError where something is in the way of an export."""
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination} exists already: name a directory that does not, exports replace nothing")


def _multiplies_exactly(dtype: torch.dtype) -> bool:
    """Whether products lose no more than float32 does: 16-bit types, TF32 and the like promise no equality."""
    return dtype == torch.float64 or (dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest")


@torch.no_grad()
def compare(reference: HybridLanguageModel, cut: HybridLanguageModel) -> tuple[float, float]:
    """Largest difference of two models' logits on a row of random ids, and the largest logit itself."""
    length = min(_PROBE_TOKENS, cut.config.max_position_embeddings)
    ids = torch.randint(cut.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    expected, found = (one(ids.to(one.device), use_cache=False).logits.double() for one in (reference, cut))
    return float((expected - found).abs().max()), float(expected.abs().max())


def _card(
    destination: Path,
    model: HybridLanguageModel,
    cut: HybridLanguageModel,
    plan: PrunePlan,
    parent: str,
    context: int | None,
    costs: dict[str, Cost] | None,
    difference: float,
    largest: float,
) -> str:
    """The model card: what was cut, and what that measured."""
    layers = "".join(
        f"| {index} | {_kept(kept)} | {'learned' if kept.gate is None else 'constant'} | {kept.reason} |\n"
        for index, kept in enumerate(plan.layers)
    )
    has_constants = any(layer.has_constants for layer in plan.layers)
    stand_in = "constants that the plan recorded" if has_constants else "zeros: the plan recorded no constants"
    parts = [
        CARD_HEADER,
        f"# {destination.name}, a pruned {Path(parent).name}\n",
        f"Made from `{parent}` by a plan of the criterion {plan.criterion} (`{PLAN}`). In place of what was removed "
        f"stand {stand_in}, folded into the weights.\n",
        f"{_merged(cut)}| layer | keeps | gate | because |\n|---|---|---|---|\n{layers}",
        "## Measured\n",
        _figures(model, cut, context, costs),
        f"On {_PROBE_TOKENS} random tokens its logits differ from those of the parent with the same constants by at "
        f"most {difference:.2g}, the largest logit being {largest:.3g}.\n",
    ]
    if plan.expected:
        expected = ", ".join(f"{name} {value:.4g}" for name, value in plan.expected.items())
        parts.append(f"The plan expected, on its own measurements: {expected}.\n")
    parts.append(f'```python\nimport fusiontree\n\nmodel = fusiontree.load("{destination.name}")\n```\n')
    return "\n".join(parts)


def _merged(cut: HybridLanguageModel) -> str:
    layers = [str(layer) for layer in range(cut.config.num_layers) if cut.config.merges(layer) != "none"]
    return f"Consecutive linear maps are merged in layers {', '.join(layers)}.\n\n" if layers else ""


def _kept(decision: LayerDecision) -> str:
    heads = [f"{name} heads {', '.join(map(str, removed))}" for name, removed in decision.heads.items()]
    return decision.keep + (f" without {' and '.join(heads)}" if heads else "")


def _figures(
    model: HybridLanguageModel, cut: HybridLanguageModel, context: int | None, costs: dict[str, Cost] | None
) -> str:
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, cut)]
    rows = [("parameters", counts[0], counts[1], "{:,.0f}")]
    if costs is not None:
        before, after = costs["parent"], costs["export"]
        rows += [
            ("weights, MB", before.weight_bytes / 1e6, after.weight_bytes / 1e6, "{:,.2f}"),
            (f"state of {context:,} tokens, kB", before.state_bytes / 1e3, after.state_bytes / 1e3, "{:,.1f}"),
            (f"reading {context:,} tokens, ms", 1e3 * before.prefill_seconds, 1e3 * after.prefill_seconds, "{:,.1f}"),
            ("one token after them, ms", 1e3 * before.decode_seconds, 1e3 * after.decode_seconds, "{:,.2f}"),
        ]
    lines = [f"| {name} | {form.format(a)} | {form.format(b)} | {b / a:.2f} |" for name, a, b, form in rows]
    where = "" if costs is None else f"\n\n{cut.device}, {str(cut.dtype).removeprefix('torch.')}, medians in one run"
    where += "" if costs is None else f", {torch.get_num_threads()} thread(s), torch {torch.__version__}."
    return "| | parent | export | ratio |\n|---|---|---|---|\n" + "\n".join(lines) + where + "\n"
