"""The hybrid language model: embeddings, a stack of hybrid blocks, a language-model head.

Shapes: B batch, T tokens, H hidden, V vocabulary, L layers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fusiontree.errors import InputError, nearest
from fusiontree.models.body import Body, check_foreign
from fusiontree.models.cache import HybridCache, cache_geometry
from fusiontree.models.configuration import HybridLanguageModelConfig
from fusiontree.models.decoding import DecodingProgram, StepInputs
from fusiontree.models.gate_stats import GateDetails, GateStats
from fusiontree.models.generation import HybridGenerationMixin
from fusiontree.models.hybrid_block import CHECKPOINTING_SCOPES, DEFAULT_SCOPE, BlockGates, HybridBlock
from fusiontree.models.initialization import initialize
from fusiontree.models.layout import IGNORE_INDEX, SRTE, Layout, SinusoidTable, build_layout, shift_labels
from fusiontree.ops import linear_cross_entropy


@dataclass
class HybridOutput(ModelOutput):
    """What `HybridLanguageModel.forward` returns.

    Attributes:
        loss: scalar, mean language-model loss over the labels that count; with labels only.
        logits: [B, T, V]; None beside labels unless asked for.
        past_key_values: the updated state.
        hidden_states: L+1 tensors [B, T, H], the embeddings and each block's output, when asked for.
        gate_stats: what the gates did.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: HybridCache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    gate_stats: GateStats | None = None


@dataclass
class BackboneOutput:
    """Everything below the head: the last hidden states [B, T, H], the layout they were read in, the rest as in
    `HybridOutput`; logits [B, T, V] where the head was part of one program with the blocks."""

    last_hidden_state: torch.Tensor
    layout: Layout
    past_key_values: HybridCache | None
    hidden_states: tuple[torch.Tensor, ...] | None
    gate_stats: GateStats
    logits: torch.Tensor | None = None


class HybridLanguageModel(PreTrainedModel, HybridGenerationMixin):
    """Causal language model of hybrid blocks; loads, saves and generates like any transformers model."""

    config_class = HybridLanguageModelConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias"]
    _is_stateful = True
    _supports_sdpa = True
    _can_compile_fullgraph = False

    def __init__(self, config: HybridLanguageModelConfig):
        super().__init__(config)
        self._body = Body(self)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_dropout = nn.Dropout(config.dropout)
        self.srte = SRTE(config)
        self.rotary = SinusoidTable(config.head_dim, config.rope_theta)
        self.layers = nn.ModuleList(HybridBlock(config, layer) for layer in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Read by the initialisation.
        self.lm_head.is_head = True  # type: ignore[assignment]
        self.layers[-1].ln_output.feeds_head = True  # type: ignore[union-attr]
        self._dropout_key = (0, 0, 0)
        self._geometry = cache_geometry(config)
        self._decoding_program: DecodingProgram | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and not any(module is part for part in self.modules()):
            module.is_head = True  # type: ignore[assignment]  # a new one, made by `resize_token_embeddings`
        initialize(module, self.config)

    @property
    def base_model(self) -> Body:
        """The model without its head."""
        return self._body

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """What transformers' `gradient_checkpointing_enable` ends in; its kwargs may name a `scope` beside torch's own.

        Raises:
            InputError: a scope that is none of `CHECKPOINTING_SCOPES`.
        """
        # transformers binds the kwargs to the function, which would not know this one.
        bound = gradient_checkpointing_func if isinstance(gradient_checkpointing_func, partial) else None
        keywords = {"use_reentrant": False} | (bound.keywords if bound else {})
        scope = keywords.pop("scope", DEFAULT_SCOPE)
        if scope not in CHECKPOINTING_SCOPES:
            close = nearest(str(scope), CHECKPOINTING_SCOPES)
            hint = f"; did you mean {close!r}?" if close else ""
            raise InputError(
                f"the scope of gradient checkpointing must be one of {', '.join(CHECKPOINTING_SCOPES)}, got "
                f"{scope!r}{hint}"
            )
        for layer, block in enumerate(self.layers):
            assert isinstance(block, HybridBlock)
            block.gradient_checkpointing = enable and layer % every_n_layers == 0
            block.checkpointing_scope = scope
            block.checkpoint = partial(bound.func if bound else gradient_checkpointing_func, **keywords)

    def compile_decoding(self) -> None:
        """From now on, run a step of decoding as one program: compiled on CPU, a captured graph on CUDA.

        A step is a forward pass over one token per row on top of a state, without gradients, masks, positions or
        anything asked for but logits; others run as before. On CPU the first step of each batch size takes a minute or
        so to compile, and so does the first one after a change of weights, and one past 4096 slots of the state's
        buffers (torch compiles long loops otherwise); steps then take a fraction of their time. On CUDA a graph is
        captured for each state, within a few steps' time.

        Raises:
            InputError: on CPU, there is no C++ compiler.
        """
        self._decoding_program = DecodingProgram(self)

    @property
    def decodes_compiled(self) -> bool:
        """Whether `compile_decoding` was called."""
        return self._decoding_program is not None

    def set_dropout_key(self, seed: int, step: int, micro_batch: int) -> None:
        """Choose the branch dropout of the next training forward; equal keys drop equal branches on every rank.

        Without this call each training forward counts as the next step of seed 0.
        """
        self._dropout_key = (seed, step, micro_batch)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: HybridCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_gates: bool = False,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
    ) -> HybridOutput | tuple:
        """Read [B, T] tokens, on top of `past_key_values` if given.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, H].
            attention_mask: [B, past + T], 0 for padding at a row's ends.
            position_ids: [B, T] or [1, T]; a token whose position is 0 starts a document. Default: real tokens counted.
            labels: [B, T], unshifted as everywhere in transformers; -100 and a document's first token never count.
            past_key_values: a `HybridCache`, updated in place.
            use_cache: return the state; default `config.use_cache`, but not in training or beside labels.
            output_gates: fill `gate_stats.details`.
            logits_to_keep: n > 0 keeps the logits of the last n columns; a tensor names the columns, [n] for all rows
                or [B, n] for each; 0 keeps all.
            return_dict: False returns a tuple.
            output_attentions: for callers written for other models; True is an error, no such weights are ever held.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx: what collators of packed rows give beside
                `position_ids`, which say the same and are read alone.

        Raises:
            InputError: sizes, cache or positions that do not fit.
            TypeError: an unknown keyword.
        """
        check_foreign(position_ids, output_attentions, cu_seq_lens_q, cu_seq_lens_k, seq_idx)
        base = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            use_cache=use_cache if use_cache is not None or labels is None else False,
            output_hidden_states=output_hidden_states,
            output_gates=output_gates,
        )
        hidden, layout = base.last_hidden_state, base.layout
        loss = logits = None
        if labels is not None:
            labels = labels.to(hidden.device)
            if layout.mask is not None:
                labels = labels.masked_fill(~layout.mask, IGNORE_INDEX)
            targets = shift_labels(labels, layout.documents)
            loss = self._loss(hidden, targets)
        keeps = isinstance(logits_to_keep, torch.Tensor) or logits_to_keep > 0
        if labels is None or keeps or self.config.return_logits_with_loss:
            logits = base.logits if base.logits is not None else self.lm_head(_kept(hidden, logits_to_keep))
        output = HybridOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            gate_stats=base.gate_stats,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Scalar: mean over the targets [B, T] that count, which are aligned with hidden [B, T, H]."""
        if isinstance(self.lm_head, nn.Linear):
            return linear_cross_entropy(hidden, self.lm_head.weight, targets)
        # A head that an adapter (PEFT) wraps: its weight alone would leave the adapter out.
        counted = targets != IGNORE_INDEX
        logits = self.lm_head(hidden[counted]).float()
        return nn.functional.cross_entropy(logits, targets[counted], reduction="sum") / counted.sum().clamp_min(1)

    def backbone(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: HybridCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_gates: bool = False,
    ) -> BackboneOutput:
        """`forward` without the head: same arguments, no logits, no loss."""
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("pass either `input_ids` or `inputs_embeds`")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3 or x.shape[1] == 0:
            raise InputError(f"the input must be [batch, tokens] with at least one token, got {list(x.shape[:-1])}")
        batch, tokens = x.shape[:2]
        cache = self._resolve_cache(past_key_values, use_cache, batch)
        layout = build_layout(
            (batch, tokens),
            x.device,
            attention_mask=attention_mask,
            position_ids=position_ids,
            lengths=cache.lengths if cache is not None else None,
            next_position=cache.next_position if cache is not None else None,
            read=cache.read if cache is not None else None,
            past=cache.seen if cache is not None else 0,
            past_length=cache.max_length if cache is not None else 0,
            past_position=cache.max_position if cache is not None else 0,
            even=cache.even if cache is not None else True,
        )
        rotary = self.rotary(layout.position_ids, layout.max_position)
        time_encoding = self.srte(layout.position_ids, layout.max_position)
        x = self.embed_dropout(x)
        keep_hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states = [x]
        program = self._decoding_program
        if program is not None and program.takes(x, layout, cache) and not (keep_hidden or output_gates):
            assert cache is not None
            return self._decode(program, x, layout, rotary, time_encoding, cache)
        gates = []
        states = cache.layers if cache is not None else [None] * len(self.layers)
        for block, state, drop in zip(self.layers, states, self._choose_drops(), strict=True):
            x, block_gates = block(x, layout, rotary, time_encoding, state, drop, output_gates)
            gates.append(block_gates)
            if keep_hidden:
                hidden_states.append(x)
        if cache is not None:
            cache.advance(layout, tokens)
        gather = partial(_gather_gates, gates, layout, batch)
        return BackboneOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if keep_hidden else None,
            gate_stats=GateStats.deferred(gather) if gates[0].is_deferred else gather(),
            layout=layout,
        )

    def _decode(
        self,
        program: DecodingProgram,
        x: torch.Tensor,
        layout: Layout,
        rotary: tuple[torch.Tensor, torch.Tensor],
        time_encoding: torch.Tensor,
        cache: HybridCache,
    ) -> BackboneOutput:
        hidden, logits, gate_logits = program(StepInputs.of(x, layout, rotary, time_encoding, cache), cache)
        cache.advance(layout, 1)
        gates = [
            BlockGates((logit,), bool(block.is_gated), None)
            for block, logit in zip(self.layers, gate_logits, strict=True)
        ]
        return BackboneOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=None,
            gate_stats=GateStats.deferred(partial(_gather_gates, gates, layout, len(x))),
            layout=layout,
            logits=logits,
        )

    def _resolve_cache(
        self, past_key_values: HybridCache | None, use_cache: bool | None, batch: int
    ) -> HybridCache | None:
        if past_key_values is None:
            wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
            return HybridCache(self.config) if wanted else None
        if not isinstance(past_key_values, HybridCache):
            raise InputError(
                f"`past_key_values` must be a HybridCache, got {type(past_key_values).__name__}: build one with "
                "HybridCache(model.config)"
            )
        past_key_values.check(self._geometry, batch)
        return past_key_values

    def _choose_drops(self) -> list[str | None]:
        """Per layer the branch that branch dropout removes in this forward, if any."""
        probability = self.config.drop_branch_prob
        if not self.training or probability == 0:
            return [None] * len(self.layers)
        seed, step, micro_batch = self._dropout_key
        self._dropout_key = (seed, step, micro_batch + 1)
        drops: list[str | None] = []
        for layer, block in enumerate(self.layers):
            draw = random.Random(f"{seed}/{step}/{micro_batch}/{layer}")
            hit = draw.random() < probability and block.branch == "both"
            drops.append(draw.choice(("mamba", "attention")) if hit else None)
        return drops


def _kept(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """[B, T, H] -> [B, kept, H]: the columns whose logits are asked for."""
    if not isinstance(logits_to_keep, torch.Tensor):
        return hidden[:, -logits_to_keep:]  # 0 keeps all
    if logits_to_keep.dim() == 2:
        return hidden.gather(1, logits_to_keep[..., None].expand(-1, -1, hidden.shape[2]))
    return hidden[:, logits_to_keep]


def _gather_gates(gates: list[BlockGates], layout: Layout, batch: int) -> GateStats:
    """Per-layer [B, T] reductions -> [L, B] means over each row's real tokens."""
    tokens = layout.real_tokens(batch)
    mean, entropy = (torch.stack(part) for part in zip(*(gate.reductions() for gate in gates), strict=True))  # [L,B,T]
    if layout.mask is None:
        mean, entropy = mean.mean(-1), entropy.mean(-1)
    else:
        weight = layout.mask / tokens.clamp_min(1)[:, None]
        mean, entropy = (mean * weight).sum(-1), (entropy * weight).sum(-1)
    active = torch.tensor([gate.active for gate in gates])
    details = None
    found = [gate.details for gate in gates]
    example = next((item for item in found if item is not None), None)
    if example is not None:
        zero = {name: torch.zeros_like(value) for name, value in example.items()}
        rows = [item if item is not None else zero for item in found]
        details = GateDetails(**{name: torch.stack([row[name] for row in rows]) for name in example})
    return GateStats(mean, entropy, tokens, active.to(mean.device), details)
