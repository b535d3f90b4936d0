"""A prune plan carried out: a smaller model of the same class in a folder that `from_pretrained` reads."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fusiontree.artifacts import LayerDecision, PrunePlan, RunManifest, atomic_directory
from fusiontree.deploy.costs import Cost, measure_costs, timed_context
from fusiontree.deploy.folding import fold
from fusiontree.deploy.quantized import Quantized, check_quantizable, quantize_weights
from fusiontree.deploy.reference import blocks_of, check_plan, reference_parent, removed_branches
from fusiontree.errors import InputError, first_line
from fusiontree.models import HybridLanguageModel
from fusiontree.train.checkpoint import no_progress_bar

PLAN = "prune_plan.json"
CARD = "README.md"
CARD_HEADER = "---\nlibrary_name: fusiontree\npipeline_tag: text-generation\ntags: [fusiontree, pruned]\n---\n"
#: Of the largest logit, or of 1: how far an export in float32 may be from its parent with the plan's constants.
TOLERANCE = 1e-5
_PROBE_TOKENS = 64


@dataclass(frozen=True)
class _Rounded:
    """The export as `--weights` rounds it when it is loaded: that is measured, and not written."""

    kind: str
    done: Quantized
    difference: float
    """Of its largest logit on the probe from the export's."""


def export(
    model: HybridLanguageModel,
    plan: PrunePlan,
    path: str | os.PathLike[str],
    *,
    merge: bool = False,
    dtype: torch.dtype | None = None,
    context: int | None = None,
    weights: str | None = None,
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
        weights: also measure the export with its weights rounded to `int8` or `int4`, for the card; whole ones are
            written in any case.
        parent: path of the parent for the manifest and the card; default: where it was loaded from.
        progress: called with what is done next.

    Returns:
        The exported model.

    Raises:
        InputError: the directory exists or cannot be written, the plan does not fit the model, what it says cannot be
            folded without changing the model's predictions, or as `quantize_weights`.
    """
    destination = Path(path)
    check_free(destination)
    check_plan(model, plan)
    if weights is not None:
        check_quantizable(model, weights)
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
    models, rounded = {"parent": model, "export": cut}, None
    if weights is not None:
        progress("rounding")
        models[weights] = copy.deepcopy(cut)
        done = quantize_weights(models[weights], weights)
        rounded = _Rounded(weights, done, compare(cut, models[weights])[0])
    costs = None
    if context is not None:
        context = timed_context(model.config, context)
        costs = measure_costs(models, context=context, progress=progress)
    settings: dict[str, Any] = {"plan": plan.model_dump(mode="json", exclude={"layers"})}
    if costs is not None:
        measured = {name: asdict(cost) for name, cost in costs.items()}
        settings["costs"] = {"context": context, "device": str(model.device), **measured}
    if rounded is not None:
        settings["rounded"] = asdict(rounded)
    # Absolute: `heal` and `report` look for it from wherever they are called.
    manifest = RunManifest.collect(settings, parent_run=os.path.abspath(parent) if os.path.exists(parent) else parent)
    progress("writing")
    try:
        with atomic_directory(destination) as folder:
            with no_progress_bar():
                cut.save_pretrained(folder)
            if cut.tokenizer is not None:
                cut.tokenizer.save_pretrained(folder)
            manifest.save(folder / "manifest.json")
            plan.save(folder / PLAN)
            card = _card(destination, model, cut, plan, parent, context, costs, difference, largest, rounded)
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
    rounded: _Rounded | None,
) -> str:
    """The model card: what was cut, and what that measured."""
    layers = "".join(
        f"| {index} | {_kept(kept)} | {_gate(kept)} | {kept.reason} |\n" for index, kept in enumerate(plan.layers)
    )
    stand_in = "zeros: the plan recorded no constants"
    if any(layer.has_constants for layer in plan.layers):
        stand_in = "constants that the plan recorded"
    layers_cut = zip(blocks_of(model), plan.layers, strict=True)
    removes = any(removed_branches(block, layer) or layer.heads for block, layer in layers_cut)
    cut_out = f" In place of what was removed stand {stand_in}, folded into the weights." if removes else ""
    parts = [
        CARD_HEADER,
        f"# {destination.name}, a pruned {Path(parent).name}\n",
        f"Made from `{parent}` by a plan of the criterion {plan.criterion} (`{PLAN}`).{cut_out}\n",
        f"{_merged(cut)}| layer | keeps | gate | because |\n|---|---|---|---|\n{layers}",
        "## Measured\n",
        _figures(model, cut, context, costs, rounded),
        f"On {_PROBE_TOKENS} random tokens its logits differ from those of the parent with the same constants by at "
        f"most {difference:.2g}, the largest logit being {largest:.3g}.\n",
    ]
    if rounded is not None:
        parts.append(
            f"With its weights in {rounded.kind}, as `--weights {rounded.kind}` rounds them when this folder is loaded "
            f"({rounded.done}), its logits move by at most {rounded.difference:.2g} on the same tokens.\n"
        )
    if plan.expected:
        expected = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in plan.expected.items())
        before = " and before maps were merged" if _merged(cut) else ""
        parts.append(f"The plan expected, by its own measurements{before}: {expected}.\n")
    parts.append(f'```python\nimport fusiontree\n\nmodel = fusiontree.load("{destination.name}")\n```\n')
    return "\n".join(parts)


def _merged(cut: HybridLanguageModel) -> str:
    layers = [str(layer) for layer in range(cut.config.num_layers) if cut.config.merges(layer) != "none"]
    where = f"layer{'s' if len(layers) > 1 else ''} {', '.join(layers)}"
    return f"Consecutive linear maps are merged in {where}.\n\n" if layers else ""


def _gate(decision: LayerDecision) -> str:
    return "–" if decision.keep == "constant" else "learned" if decision.gate is None else "constant"


def _kept(decision: LayerDecision) -> str:
    heads = [f"{name} heads {', '.join(map(str, removed))}" for name, removed in decision.heads.items()]
    return decision.keep + (f" without {' and '.join(heads)}" if heads else "")


def _figures(
    model: HybridLanguageModel,
    cut: HybridLanguageModel,
    context: int | None,
    costs: dict[str, Cost] | None,
    rounded: _Rounded | None,
) -> str:
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, cut)]
    names = ["parent", "export"]
    rows: list[tuple[str, str, list[float]]] = [("parameters", "{:,.0f}", [float(count) for count in counts])]
    where = ""
    if costs is not None:
        if rounded is not None:
            names.append(rounded.kind)
            rows[0][2].append(counts[1])
        found = [costs[name] for name in names]
        rows += [
            ("weights, MB", "{:,.2f}", [cost.weight_bytes / 1e6 for cost in found]),
            (f"state of {context:,} tokens, kB", "{:,.1f}", [cost.state_bytes / 1e3 for cost in found]),
            (f"reading {context:,} tokens, ms", "{:,.1f}", [1e3 * cost.prefill_seconds for cost in found]),
            ("one token after them, ms", "{:,.2f}", [1e3 * cost.decode_seconds for cost in found]),
        ]
        own, its = (str(one.dtype).removeprefix("torch.") for one in (cut, model))
        types = own if own == its else f"{own}, the parent in {its}"
        where = (
            f"\n\n{cut.device}, {types}, medians in one run, "
            f"{torch.get_num_threads()} thread(s), torch {torch.__version__}."
        )
    heads = ["", names[0], *(cell for name in names[1:] for cell in (name, "ratio"))]
    lines = [heads, ["---"] * len(heads)]
    for name, form, (first, *others) in rows:
        cells = [cell for value in others for cell in (form.format(value), f"{value / first:.2f}")]
        lines.append([name, form.format(first), *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + where + "\n"
