"""What the columns of a report are to each other: a parent, what was cut from it, what healed that, and its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusiontree.artifacts import checkpoint_step
from fusiontree.eval.columns import Column, column_name

_CUT = ("model.layer_branches", "model.layer_heads", "model.layer_gates")


def cut_from(column: Column) -> str | None:
    """The parent that an export names."""
    manifest = column.manifest
    is_export = manifest is not None and column.kind == "model" and "plan" in manifest.config
    return manifest.parent_run if manifest is not None and is_export else None


def is_at(path: str | None, column: Column) -> bool:
    """Whether a model's path is the column's directory, or a checkpoint in it."""
    if path is None:
        return False
    found, own = Path(path).resolve(), column.path.resolve()
    return found == own or own in found.parents


def parent_among(columns: Sequence[Column]) -> Column | None:
    """The first that another was cut or healed from."""
    return next((column for column in columns if _is_parent(column, columns)), None)


def role(column: Column, columns: Sequence[Column]) -> str | None:
    """What a column is to the others, in a few words; None where its files do not tell."""
    if column.heal is not None:
        return f"healed from {_named(column.heal.export, columns)}"
    parent = cut_from(column)
    if parent is not None:
        criterion = column.plan.criterion if column.plan is not None else None
        if criterion == "random":
            return f"random cut from {_named(parent, columns)}"
        return f"cut from {_named(parent, columns)}" + (f" by {criterion}" if criterion else "")
    if _is_parent(column, columns):
        return "parent"
    if column.manifest is not None and column.manifest.parent_run is not None:
        return f"continued from {_named(column.manifest.parent_run, columns)}"
    # Of a checkpoint only its run knows where it comes from.
    is_whole = checkpoint_step(column.path.resolve()) is None and not any(column.settings.get(key) for key in _CUT)
    return "plain model" if column.manifest is not None or is_whole else None


def tokens_learned(column: Column, columns: Sequence[Column]) -> float | None:
    """Tokens that a model was trained on, those of what it was made from included; None where that is not known."""
    own = column.numbers("tokens")
    if column.heal is not None:
        sources = [column.heal.export, column.heal.parent]
    else:
        # A run that went on from another's training state counts that one's tokens itself.
        started = column.settings.get("training.init_from")
        sources = [source for source in (cut_from(column), started) if source is not None]
    if not sources:
        return own[-1] if own else None
    others = [other for other in columns if other is not column]
    origin = next((other for source in sources for other in others if is_at(source, other)), None)
    before = None if origin is None else tokens_learned(origin, others)
    return None if before is None else before + (own[-1] if own else 0)


def _is_parent(column: Column, columns: Sequence[Column]) -> bool:
    return any(is_at(cut_from(other), column) or (other.heal and is_at(other.heal.parent, column)) for other in columns)


def _named(path: str, columns: Sequence[Column]) -> str:
    return next((other.name for other in columns if is_at(path, other)), column_name(Path(path).resolve()))
