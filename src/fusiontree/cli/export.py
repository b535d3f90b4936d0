"""`fusiontree export`."""

from __future__ import annotations

from pathlib import Path

import typer


def export(
    model: Path = typer.Argument(..., help="Model folder, or a run directory, whose newest checkpoint is taken."),
    plan: Path = typer.Argument(..., help="prune_plan.json, as `fusiontree plan` and training write it."),
    out: Path = typer.Argument(..., help="Directory to write the smaller model to; must not exist yet."),
    merge: bool = typer.Option(
        False, "--merge", help="Also multiply out linear maps in layers of one branch whose gate is gone."
    ),
    context: int = typer.Option(
        4096, "--context", min=0, help="Tokens at which speed is measured; 0 = do not measure."
    ),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="Of what is written: float32, bfloat16, float16."),
    weights: str = typer.Option(
        None, "--weights", help="int8 or int4: also measure the export so rounded; whole weights are written."
    ),
) -> None:
    """Apply a prune plan: write the smaller model, its tokenizer, manifest, plan and a model card.

    What became constant is folded into the weights around it, in float64; the result loads like any other model.
    """
    from fusiontree.artifacts import PrunePlan
    from fusiontree.cli._options import dtype_named, working
    from fusiontree.deploy.export_pruned import check_free
    from fusiontree.deploy.export_pruned import export as export_model
    from fusiontree.deploy.loading import find_model, load
    from fusiontree.deploy.reference import check_plan, planned_dtype

    check_free(out)
    wanted = dtype_named(dtype)
    loaded_plan = PrunePlan.load(plan)
    loaded = load(model, device=device, dtype=planned_dtype(loaded_plan))
    check_plan(loaded, loaded_plan, where=str(plan))
    with working("export") as progress:
        cut = export_model(
            loaded,
            loaded_plan,
            out,
            merge=merge,
            dtype=wanted,
            context=context or None,
            weights=weights,
            parent=str(find_model(model)),
            progress=progress,
        )
    before, after = (sum(parameter.numel() for parameter in one.parameters()) for one in (loaded, cut))
    kinds = loaded_plan.layer_branches
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("both", "mamba", "attention", "constant"))
    counted = "; ".join([counted, *loaded_plan.finer_cuts])
    if merged := sum(cut.config.merges(layer) != "none" for layer in range(cut.config.num_layers)):
        counted += f"; maps merged in {merged}"
    elif merge:
        print("no maps are merged: that takes a layer of one branch whose gate is frozen")
    print(f"{before:,} -> {after:,} parameters ({after / before:.2f}x); layers: {counted}")
    own = [loaded.config.branch(layer) for layer in range(loaded.config.num_layers)]
    shapes = [{name: parameter.shape for name, parameter in one.named_parameters()} for one in (loaded, cut)]
    if shapes[0] == shapes[1]:
        reasons: dict[str, list[str]] = {}
        for index, layer in enumerate(loaded_plan.layers):
            reasons.setdefault(layer.reason, []).append(str(index))
        why = "; ".join(f"{reason} (layers {', '.join(layers)})" for reason, layers in reasons.items())
        print(f"nothing is cut, {out} is a copy of its parent: {why}")
    elif (any(layer.num_heads_removed for layer in loaded_plan.layers) or kinds != own) and not any(
        layer.has_constants for layer in loaded_plan.layers
    ):
        print(f"{plan} records no constants, so zeros stand in: `fusiontree plan` records what branches say on average")
    if loaded_plan.model is None:
        print(f"{plan} has no fingerprint of the model that it was made for: that it was this one is taken on trust")
    print(out)
