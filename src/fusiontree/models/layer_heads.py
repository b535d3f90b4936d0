"""How many heads each layer has, where some were cut (`layer_heads`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from fusiontree.errors import InputError, nearest

if TYPE_CHECKING:
    from fusiontree.models.configuration import HybridLanguageModelConfig

#: Keys of a layer's entry, and the branch whose heads each counts.
HEAD_KINDS = {"mamba": "mamba", "local": "attention", "global": "attention"}


class LayerHeads(NamedTuple):
    """Heads of one layer; 0 of a branch that it does not have.

    Attributes:
        mamba: heads of the Mamba branch; of version 1, which has none, always 0.
        local: query heads that see the window.
        globals: query heads that see the document.
        group: query heads that share a key/value head.
    """

    mamba: int
    local: int
    globals: int
    group: int

    @property
    def queries(self) -> int:
        return self.local + self.globals

    @property
    def keys(self) -> int:
        """Key/value heads, the local ones first."""
        return self.queries // self.group

    @property
    def global_keys(self) -> int:
        return self.globals // self.group

    def entry(self) -> dict[str, int]:
        """As `layer_heads` has it: the kinds of heads of the branches that are there."""
        found = {"mamba": self.mamba} if self.mamba else {}
        return found | ({"local": self.local, "global": self.globals} if self.queries else {})


def whole_layer(config: HybridLanguageModelConfig, branch: str) -> LayerHeads:
    """Heads of a layer with these branches of which none was cut."""
    has_mamba, has_attention = branch in ("both", "mamba"), branch in ("both", "attention")
    group = config.num_heads // config.num_kv_heads
    return LayerHeads(
        mamba=config.mamba_inner_size // config.mamba_head_dim if has_mamba and config.mamba_version == 2 else 0,
        local=config.num_heads - config.global_heads if has_attention else 0,
        globals=config.global_heads if has_attention else 0,
        group=group,
    )


def heads_of_layer(config: HybridLanguageModelConfig, layer: int) -> LayerHeads:
    """Heads of one layer, by its entry of `layer_heads`; what that leaves out is whole."""
    whole = whole_layer(config, config.branch(layer))
    entry = (config.layer_heads[layer] if config.layer_heads is not None else None) or {}
    return LayerHeads(
        mamba=entry.get("mamba", whole.mamba),
        local=entry.get("local", whole.local),
        globals=entry.get("global", whole.globals),
        group=whole.group,
    )


def check_layer_heads(config: HybridLanguageModelConfig) -> None:
    """Raises InputError unless every entry of `layer_heads` can be built."""
    entries: Any = config.layer_heads
    if not isinstance(entries, list) or len(entries) != config.num_layers:
        found = f"{len(entries)} entries" if isinstance(entries, list) else repr(entries)
        raise InputError(
            f"`layer_heads` must hold one entry for each of the {config.num_layers} layers, a mapping or null, got "
            f"{found}"
        )
    for layer, entry in enumerate(entries):
        if entry is not None:
            _check_entry(config, layer, entry)


def _check_entry(config: HybridLanguageModelConfig, layer: int, entry: Any) -> None:
    where, branch = f"`layer_heads[{layer}]`", config.branch(layer)
    if not isinstance(entry, dict):
        raise InputError(f"{where} must be null or name numbers of heads, as in {{mamba: 4, local: 2}}, got {entry!r}")
    whole = whole_layer(config, branch)
    most = {"mamba": whole.mamba, "local": whole.local, "global": whole.globals}
    for kind, count in entry.items():
        if kind not in HEAD_KINDS:
            close = nearest(str(kind), HEAD_KINDS)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(HEAD_KINDS)}"
            raise InputError(f"{where} counts heads of the kind {kind!r}; {hint}")
        if kind == "mamba" and config.mamba_version == 1:
            raise InputError(f"{where} counts Mamba heads, which `mamba_version` 1 does not have")
        if branch not in ("both", HEAD_KINDS[kind]):
            raise InputError(f"{where} counts {kind} heads, but the layer keeps `{branch}` alone")
        if type(count) is not int or not 0 <= count <= most[kind]:
            raise InputError(f"{where} must keep between 0 and {most[kind]} {kind} heads, got {count!r}")
        if HEAD_KINDS[kind] == "attention" and count % whole.group:
            raise InputError(
                f"{where} keeps {count} {kind} heads, which is no multiple of the {whole.group} query heads that share "
                "a key/value head"
            )
    left = heads_of_layer(config, layer)
    for name, heads, before in (("mamba", left.mamba, whole.mamba), ("attention", left.queries, whole.queries)):
        if before and not heads:
            raise InputError(f"{where} leaves the branch `{name}` no head: take the branch out with `layer_branches`")
