"""What a cut is to reach, and what each cut is worth towards it on this machine.

Costs in time are measured on models of the same sizes: times depend on no weight. What a branch of a layer costs is the
difference that it makes to all layers, divided by their number; of heads, by the number of heads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch

from fusiontree.artifacts import BranchKind, PrunePlan
from fusiontree.deploy.costs import Cost, measure_costs, timed_context
from fusiontree.deploy.criteria import HEAD_PARTS
from fusiontree.deploy.cuts import BRANCHES_OF, Cuts, Removal, kind_without
from fusiontree.deploy.folding import cut_config
from fusiontree.errors import InputError, nearest
from fusiontree.models import HybridCache, HybridLanguageModel, HybridLanguageModelConfig
from fusiontree.models.hybrid_block import HybridBlock

#: Times as fast, and shares that are left.
FASTER, SMALLER = ("decode", "prefill"), ("memory", "parameters")
LOSS = "max_loss_increase"
TARGETS = (*FASTER, *SMALLER, LOSS)


class ImpossibleBudgetError(InputError):
    """No cut that is allowed meets the budget; the sentence says the nearest that can be met."""


_WIDE = tuple(HybridLanguageModel._keep_in_fp32_modules_strict)  # which `.to` leaves alone, but not on meta


def parse_targets(texts: Sequence[str], where: str = "--target") -> dict[str, float]:
    """`decode=1.4x`, `memory=0.75x`, `max_loss_increase=0.05` and the like.

    Raises:
        InputError: an unknown name (the nearest is named), no number, or one that asks for nothing or the impossible.
    """
    found: dict[str, float] = {}
    for text in (part.strip() for given in texts for part in given.split(",")):
        name, separator, value = text.partition("=")
        name = name.strip()
        if name not in TARGETS:
            close = nearest(name, TARGETS)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(TARGETS)}"
            raise InputError(f"{where} {text}: there is no target {name!r}; {hint}")
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*x?\s*", value)
        if not separator or match is None:
            example = "0.05" if name == LOSS else "1.4x" if name in FASTER else "0.75x"
            raise InputError(f"{where} {text}: give a number, as in {name}={example}")
        if name in found:
            raise InputError(f"{where} {text}: {name} is asked for twice")
        if name == LOSS and value.rstrip().endswith("x"):
            raise InputError(f"{where} {text}: nats per token, as in {name}=0.05, without an x")
        found[name] = number = float(match[1])
        if name in FASTER and number <= 1:
            raise InputError(f"{where} {text}: how many times as fast, so above 1")
        if name in SMALLER and not 0 < number < 1:
            raise InputError(f"{where} {text}: the share that is to be left, so between 0 and 1")
    return found


def shortfall(targets: Mapping[str, float], reached: Mapping[str, float]) -> list[str]:
    """The targets of speed and size that are not reached."""
    missed = [name for name in FASTER if name in targets and reached[name] < targets[name]]
    return missed + [name for name in SMALLER if name in targets and reached[name] > targets[name]]


Sizes = tuple[int, int, int]
"""Parameters, bytes of the weights, bytes of the state of one sequence."""


@dataclass(frozen=True)
class CostModel:
    """What the parent costs, and what each branch of a layer adds to that."""

    config: HybridLanguageModelConfig
    dtype: torch.dtype
    context: int
    parent: Cost
    seconds: dict[tuple[str, str], tuple[float, float]]
    """(kind of layer, branch) -> seconds that the branch takes of reading `context` tokens, and of decoding one."""
    head_seconds: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Kind of heads (`HEAD_PARTS`) -> the same of one head; empty where that was not measured."""
    gate_seconds: tuple[float, float] | None = None
    """The same of one layer's gate."""
    _sizes: dict[tuple, Sizes] = field(default_factory=dict)

    @classmethod
    def measured(
        cls,
        model: HybridLanguageModel,
        *,
        context: int,
        rounds: int,
        progress: Callable[[str], None],
        heads: bool = True,
        gates: bool = True,
    ) -> CostModel:
        """Times the parent beside models that lack one branch, or both, in every layer.

        Args:
            heads: also beside models that lack half of the heads of each kind.
            gates: also beside a model whose gates are frozen.
        """
        config = model.config
        own = [config.branch(layer) for layer in range(config.num_layers)]
        context = timed_context(config, context)
        variants: dict[str, list[BranchKind]] = {
            "without mamba": [kind_without(kind, "mamba") if kind == "both" else kind for kind in own],
            "without attention": [kind_without(kind, "attention") if kind == "both" else kind for kind in own],
            "without both": ["constant"] * len(own),
        }
        models = {"parent": model} | {name: blank(model, Cuts(tuple(kinds))) for name, kinds in variants.items()}
        fewer = {part: cuts for part in HEAD_PARTS if (cuts := _fewer_heads(config, part)).heads} if heads else {}
        models |= {f"fewer {part}": blank(model, cuts) for part, cuts in fewer.items()}
        gated = frozenset(layer for layer, kind in enumerate(own) if config.has_gate(layer) and kind != "constant")
        if gates:
            models["frozen gates"] = blank(model, Cuts(tuple(own), frozen=gated))
        costs = measure_costs(models, context=context, rounds=rounds, progress=progress)

        def seconds(whole: Cost, rest: Cost, layers: int) -> tuple[float, float]:
            pairs = zip(
                (whole.prefill_seconds, whole.decode_seconds), (rest.prefill_seconds, rest.decode_seconds), strict=True
            )
            prefill, decode = (max(0.0, a - b) / max(1, layers) for a, b in pairs)
            return prefill, decode

        both = own.count("both")
        found = {}
        for branch, other in (("mamba", "attention"), ("attention", "mamba")):
            found["both", branch] = seconds(costs["parent"], costs[f"without {branch}"], both)
            alone = costs[f"without {other}"] if both else costs["parent"]
            found[branch, branch] = seconds(alone, costs["without both"], sum(kind != "constant" for kind in own))
        of_heads = {
            part: seconds(costs["parent"], costs[f"fewer {part}"], len(cuts.heads)) for part, cuts in fewer.items()
        }
        of_gate = seconds(costs["parent"], costs["frozen gates"], len(gated)) if gates else None
        return cls(config, model.dtype, context, costs["parent"], found, of_heads, of_gate)

    def cost(self, cuts: Cuts) -> Cost:
        """What the model with these cuts costs: sizes exactly, times by the branches, heads and gates that are gone.

        Raises:
            InputError: heads or gates are gone, and what one costs was not measured.
        """
        prefill, decode = self.parent.prefill_seconds, self.parent.decode_seconds
        for layer, kind in enumerate(cuts.kinds):
            own = self.config.branch(layer)
            for branch in BRANCHES_OF[own]:
                if branch not in BRANCHES_OF[kind]:
                    saved = self.seconds[own, branch]
                    prefill, decode = prefill - saved[0], decode - saved[1]
                    own = kind_without(own, branch)
        for layer, branch, head in cuts.heads:
            part = "mamba heads" if branch == "mamba" else "local heads"
            if branch == "attention" and head >= self.config.heads(layer).local:
                part = "global heads"
            if part not in self.head_seconds:
                raise InputError(f"what {part} cost was not measured: use CostModel.measured with heads=True")
            saved = self.head_seconds[part]
            prefill, decode = prefill - saved[0], decode - saved[1]
        # Where both branches went, the gate went with them.
        if frozen := sum(cuts.kinds[layer] != "constant" and self.config.has_gate(layer) for layer in cuts.frozen):
            if self.gate_seconds is None:
                raise InputError("what gates cost was not measured: use CostModel.measured with gates=True")
            prefill, decode = prefill - frozen * self.gate_seconds[0], decode - frozen * self.gate_seconds[1]
        config = _config_of(self.config, cuts)
        parameters, weight_bytes, state_bytes = sizes(config, self.dtype, self.context, self._sizes)
        # Times are sums of measured differences, which may add up to more than there is.
        floor = 0.02
        return Cost(
            parameters,
            weight_bytes,
            state_bytes,
            max(prefill, floor * self.parent.prefill_seconds),
            max(decode, floor * self.parent.decode_seconds),
        )

    def reached(self, cuts: Cuts) -> dict[str, float]:
        """By the names of targets."""
        return self.cost(cuts).against(self.parent)

    def spared(self, cuts: Cuts, removal: Removal) -> dict[str, float]:
        """What one more cut saves: parameters, bytes of weights and state, seconds, by the names of `Cost`."""
        before, after = (asdict(self.cost(found)) for found in (cuts, cuts.without(removal)))
        return {name: before[name] - after[name] for name in before}

    def saving(self, cuts: Cuts, removal: Removal, wanted: Sequence[str]) -> float:
        """Share of the parent's cost that one more cut saves: mean over the targets `wanted`, or of decoding alone."""
        names = [name for name in wanted if name != LOSS] or ["decode"]
        after = cuts.without(removal)
        return sum(self._share(cuts, name) - self._share(after, name) for name in names) / len(names)

    def _share(self, cuts: Cuts, name: str) -> float:
        value = self.reached(cuts)[name]
        return 1 / value if name in FASTER else value


def _fewer_heads(config: HybridLanguageModelConfig, part: str) -> Cuts:
    """Half of the heads of one kind gone from every layer; all of them where others are left in the branch."""
    removed: set[tuple[int, str, int]] = set()
    for layer in range(config.num_layers):
        own = config.heads(layer)
        if part == "mamba heads":
            removed |= {(layer, "mamba", head) for head in range(own.mamba // 2)}
            continue
        count, others = (own.local, own.globals) if part == "local heads" else (own.globals, own.local)
        gone = count if others else count // own.group // 2 * own.group
        first = 0 if part == "local heads" else own.local
        removed |= {(layer, "attention", head) for head in range(first, first + gone)}
    kinds = tuple(config.branch(layer) for layer in range(config.num_layers))
    return Cuts(cast("tuple[BranchKind, ...]", kinds), heads=frozenset(removed))


def _config_of(config: HybridLanguageModelConfig, cuts: Cuts) -> HybridLanguageModelConfig:
    decisions = [cuts.decision(layer) for layer in range(len(cuts.kinds))]
    for layer in cuts.frozen:
        decisions[layer].gate = [0.5] * config.hidden_size
    return cut_config(config, PrunePlan(criterion="", thresholds={}, source="", layers=decisions))


def blank(model: HybridLanguageModel, cuts: Cuts) -> HybridLanguageModel:
    """A model with these cuts and random weights, where and as the given one is."""
    config = _config_of(model.config, cuts)
    with torch.random.fork_rng(devices=[]):
        return HybridLanguageModel(config).to(device=model.device, dtype=model.dtype).eval()


def sizes(
    config: HybridLanguageModelConfig, dtype: torch.dtype, context: int, known: dict[tuple, Sizes] | None = None
) -> Sizes:
    """Sizes of a model with the state of `context` tokens, nothing allocated.

    Args:
        known: those of parts that were counted before, added to: cuts of one model share most of their layers.
    """
    known = {} if known is None else known
    if () not in known:
        known[()] = _outside_layers(config, dtype)
    parts = [known[()]]
    for layer in range(config.num_layers):
        part = (layer, config.branch(layer), config.has_gate(layer), config.merges(layer), config.heads(layer))
        if part not in known:
            known[part] = _of_layer(config, layer, dtype, context)
        parts.append(known[part])
    parameters, weight_bytes, state_bytes = map(sum, zip(*parts, strict=True))
    return parameters, weight_bytes, state_bytes


def _outside_layers(config: HybridLanguageModelConfig, dtype: torch.dtype) -> Sizes:
    empty: dict[str, Any] = {"layer_branches": ["constant"] * config.num_layers}
    empty |= dict.fromkeys(("layer_heads", "layer_gates", "layer_merges"))
    with torch.device("meta"):
        model = HybridLanguageModel(HybridLanguageModelConfig.from_dict(config.to_dict() | empty)).to(dtype)
    return (*_weights((n, p) for n, p in model.named_parameters() if not n.startswith("layers.")), 0)


def _of_layer(config: HybridLanguageModelConfig, layer: int, dtype: torch.dtype, context: int) -> Sizes:
    with torch.device("meta"):
        block = HybridBlock(config, layer).to(dtype)
        state = HybridCache(config).layers[layer]
        if "conv" in state.geometry:
            state.ensure_mamba(1, dtype, torch.device("meta"))
        if "window" in state.geometry:
            state.ensure_attention(1, context, torch.empty(0, dtype=dtype))
    held = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    return (*_weights(block.named_parameters()), held)


def _weights(named: Iterable[tuple[str, torch.Tensor]]) -> tuple[int, int]:
    """Numbers and bytes of some parameters."""
    numbers = size = 0
    for name, parameter in named:
        numbers += parameter.numel()
        each = parameter.element_size()
        size += parameter.numel() * (max(4, each) if name.endswith(_WIDE) else each)
    return numbers, size
