"""Configuration of the hybrid language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from transformers import PreTrainedConfig

from fusiontree.errors import InputError, nearest
from fusiontree.models.layer_heads import LayerHeads, check_layer_heads, heads_of_layer
from fusiontree.models.merged_maps import check_layer_merges

BRANCHES = ("both", "mamba", "attention", "constant")

# Fields that came after the first saved models, with what a model saved without them has.
EARLIER_VALUES: dict[str, Any] = {"mlp": "aligned", "layer_gates": None, "layer_heads": None, "layer_merges": None}

# Keys that transformers itself adds to a configuration when it saves, loads or instantiates a model.
_TRANSFORMERS_KEYS = frozenset(
    {
        "_name_or_path",
        "_commit_hash",
        "_attn_implementation_autoset",
        "attn_implementation",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "torch_dtype",
        "transformers_version",
        "use_return_dict",
    }
)


# What `from_pretrained` may hand on to `from_dict` beside fields: where and how to look for the file.
_LOADING_KEYS = frozenset(
    {
        *("cache_dir", "code_revision", "dtype", "force_download", "local_files_only", "proxies"),
        *("return_unused_kwargs", "revision", "subfolder", "token", "trust_remote_code", "user_agent"),
    }
)


class HybridLanguageModelConfig(PreTrainedConfig):
    """Sizes and choices of a `HybridLanguageModel`.

    Args:
        vocab_size: number of token ids V.
        hidden_size: width H of the residual stream.
        num_layers: number of hybrid blocks L.
        num_heads: query heads of each attention branch; head width D = hidden_size / num_heads.
        num_kv_heads: key/value heads (grouped queries); None means num_heads.
        global_heads: how many of the query heads, the last ones, see the whole document.
        window_size: tokens that a local head sees, the current one included.
        attention_type: "local_global" (one window for all layers) or "pyramidal"
            (layer l has the window `window_size * 2**(3*l // num_layers)`).
        mamba_version: 2 (scalar decay per head, Dao & Gu 2024) or 1 (diagonal A, Gu & Dao 2023).
        mamba_expand: inner width of the Mamba branch as a multiple of hidden_size.
        mamba_head_dim: width P of a Mamba-2 head.
        mamba_state_size: state size N per channel; None means 64 for version 2 and 16 for version 1.
        conv_kernel: taps K of the causal depthwise convolution.
        gate_rank: rank r of the gate.
        use_alignment: whether the alignment has a hidden layer beside its linear shortcut.
        mlp: what a block's MLP reads: "residual", the normalised residual stream after the mix, a SwiGLU of width
            4/3 H, or "aligned", the aligned features z, H -> 2H -> H, with as many parameters; None means "residual",
            of a model that was saved before there was a choice "aligned".
        srte_encoding: "sincos" (any length) or "learned" (up to max_position_embeddings).
        srte_rank: rank of the time encoding's projection.
        max_position_embeddings: positions of the learned time encoding; bounds nothing else.
        rope_theta: base of the rotary frequencies (Su et al. 2021).
        norm_eps: epsilon of every normalisation.
        dropout: probability on the embeddings and on each block's update, in training.
        drop_branch_prob: probability that a block with two branches loses one of them in a training step.
        layer_branches: per layer "both", "mamba", "attention" or "constant"; None means "both" everywhere.
        layer_gates: per layer whether a gate mixes the branches; without one their outputs are added, as an export does
            that folds a constant gate into the weights around it. None means everywhere.
        layer_heads: per layer None, or how many heads it keeps: a mapping of "mamba" (heads of Mamba-2), "local" and
            "global" (query heads, in whole groups that share a key/value head), each all of them where it is left out.
            None means all heads everywhere.
        layer_merges: per layer "none", "z" or "hz": which values between linear maps are no longer computed, as an
            export may leave a layer of one branch without gate (models/merged_maps.py). None means "none" everywhere.
        return_logits_with_loss: return logits beside the loss too (some trainers read them; costs [B,T,V]).

    Raises:
        InputError: unknown field (names the nearest one), or sizes that cannot be built.
    """

    model_type = "fusiontree"
    keys_to_ignore_at_inference = ["past_key_values", "gate_stats"]
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
    }
    # Libraries read it of a class that is not transformers' own (trl, when it loads a reference model). No field.
    auto_map = dict[str, str]()

    vocab_size: int = 50257
    hidden_size: int = 1536
    num_layers: int = 18
    num_heads: int = 12
    num_kv_heads: int = None  # resolved in __post_init__
    global_heads: int = 2
    window_size: int = 256
    attention_type: str = "local_global"
    mamba_version: int = 2
    mamba_expand: int = 2
    mamba_head_dim: int = 64
    mamba_state_size: int = None  # resolved in __post_init__
    conv_kernel: int = 4
    gate_rank: int = 96
    use_alignment: bool = True
    mlp: str = None  # resolved in __post_init__
    srte_encoding: str = "sincos"
    srte_rank: int = 128
    max_position_embeddings: int = 8192
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    drop_branch_prob: float = 0.0
    layer_branches: list[str] | None = None
    layer_gates: list[bool] | None = None
    layer_heads: list[dict[str, int] | None] | None = None
    layer_merges: list[str] | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    return_logits_with_loss: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS:
                self._refuse(key)
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.mlp is None:  # what is saved names every field, but for those that came after it
            self.mlp = "residual" if self.transformers_version is None else EARLIER_VALUES["mlp"]
        if self.mamba_state_size is None:
            self.mamba_state_size = 64 if self.mamba_version == 2 else 16
        for name in ("layer_branches", "layer_gates", "layer_merges"):
            if isinstance(getattr(self, name), tuple):
                setattr(self, name, list(getattr(self, name)))
        if isinstance(self.layer_heads, (list, tuple)):
            self.layer_heads = [dict(entry) if isinstance(entry, Mapping) else entry for entry in self.layer_heads]
        self._validate()
        super().__post_init__(**kwargs)

    @classmethod
    def _fields(cls) -> set[str]:
        return set(cls.__dataclass_fields__) | set(cls.attribute_map)

    @classmethod
    def _refuse(cls, key: str) -> NoReturn:
        close = nearest(key, sorted(cls._fields()))
        hint = f"; did you mean `{close}`?" if close else ""
        raise InputError(f"`{key}` is not a field of HybridLanguageModelConfig{hint}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers, but what is given beside the dictionary is validated too, and an unknown key raises.

        transformers sets such keys on the finished configuration, and drops those it does not know in silence.
        """
        given = {key: kwargs.pop(key) for key in cls._fields() & set(kwargs)}
        if not kwargs.get("return_unused_kwargs"):
            for key in kwargs:
                if not key.startswith("_") and key not in _TRANSFORMERS_KEYS | _LOADING_KEYS:
                    cls._refuse(key)
        return super().from_dict({**config_dict, **given}, **kwargs)

    def _validate(self) -> None:
        def require(condition: bool, message: str) -> None:
            if not condition:
                raise InputError(message)

        for name in (
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "window_size", "mamba_expand"),
            *("mamba_head_dim", "mamba_state_size", "gate_rank", "srte_rank", "max_position_embeddings"),
        ):
            value = getattr(self, name)
            is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            require(is_size, f"`{name}` must be a whole number of at least 1, got {value!r}")
        for name, choices in (
            ("attention_type", ("local_global", "pyramidal")),
            ("mlp", ("residual", "aligned")),
            ("srte_encoding", ("sincos", "learned")),
            ("mamba_version", (1, 2)),
        ):
            value = getattr(self, name)
            known = value in choices and not isinstance(value, bool)
            require(known, f"`{name}` must be one of {', '.join(map(str, choices))}, got {value!r}")
        for name in ("use_alignment", "tie_word_embeddings", "use_cache", "return_logits_with_loss"):
            value = getattr(self, name)
            require(isinstance(value, bool), f"`{name}` must be true or false, got {value!r}")
        for name in ("dropout", "drop_branch_prob"):
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and 0 <= value < 1
            require(ok, f"`{name}` must be at least 0 and below 1, got {value!r}")
        for name in ("rope_theta", "norm_eps"):
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and value > 0 and math.isfinite(value)
            require(ok, f"`{name}` must be a positive number, got {value!r}")
        require(
            type(self.conv_kernel) is int and self.conv_kernel >= 2,
            f"`conv_kernel` must be at least 2, got {self.conv_kernel!r}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"`hidden_size` {self.hidden_size} is not a multiple of `num_heads` {self.num_heads}",
        )
        require(
            self.head_dim % 2 == 0,
            f"`hidden_size` / `num_heads` must be even for rotary positions, got {self.head_dim}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"`num_heads` {self.num_heads} is not a multiple of `num_kv_heads` {self.num_kv_heads}",
        )
        require(
            type(self.global_heads) is int and 0 <= self.global_heads <= self.num_heads,
            f"`global_heads` must lie between 0 and `num_heads` {self.num_heads}, got {self.global_heads!r}",
        )
        group = self.num_heads // self.num_kv_heads
        require(
            self.global_heads % group == 0,
            f"`global_heads` {self.global_heads} must be a multiple of the {group} query heads that share a key/value "
            "head, since no key/value head serves both local and global heads",
        )
        require(self.srte_rank % 2 == 0, f"`srte_rank` must be even, got {self.srte_rank}")
        if self.mamba_version == 2:
            require(
                self.mamba_inner_size % self.mamba_head_dim == 0,
                f"`mamba_expand` x `hidden_size` = {self.mamba_inner_size} is not a multiple of `mamba_head_dim` "
                f"{self.mamba_head_dim}",
            )
        if self.layer_branches is not None:
            require(
                isinstance(self.layer_branches, list),
                f"`layer_branches` must be a list with a branch for each layer, got {self.layer_branches!r}",
            )
            require(
                len(self.layer_branches) == self.num_layers,
                f"`layer_branches` names {len(self.layer_branches)} layers, but `num_layers` is {self.num_layers}",
            )
            for index, branch in enumerate(self.layer_branches):
                require(
                    branch in BRANCHES,
                    f"`layer_branches[{index}]` must be one of {', '.join(BRANCHES)}, got {branch!r}",
                )

        if self.layer_gates is not None:
            require(
                isinstance(self.layer_gates, list)
                and len(self.layer_gates) == self.num_layers
                and all(isinstance(has, bool) for has in self.layer_gates),
                f"`layer_gates` must hold true or false for each of the {self.num_layers} layers, got "
                f"{self.layer_gates!r}",
            )
        if self.layer_heads is not None:
            check_layer_heads(self)
        if self.layer_merges is not None:
            check_layer_merges(self)

    @property
    def head_dim(self) -> int:
        """Width D of an attention head."""
        return self.hidden_size // self.num_heads

    @property
    def mamba_inner_size(self) -> int:
        """Width of the Mamba branch's inner stream."""
        return self.mamba_expand * self.hidden_size

    def branch(self, layer: int) -> str:
        """Which branches layer `layer` has: "both", "mamba", "attention" or "constant"."""
        return self.layer_branches[layer] if self.layer_branches is not None else "both"

    def has_gate(self, layer: int) -> bool:
        """Whether layer `layer` has a gate."""
        return self.branch(layer) != "constant" and (self.layer_gates is None or self.layer_gates[layer])

    def merges(self, layer: int) -> str:
        """Which values layer `layer` does not compute between linear maps: "none", "z" or "hz"."""
        return self.layer_merges[layer] if self.layer_merges is not None else "none"

    def branch_width(self, layer: int) -> int:
        """Width of what the output projection reads in a layer of one branch."""
        heads = self.heads(layer)
        if self.branch(layer) == "attention":
            return heads.queries * self.head_dim
        return self.mamba_width(layer)

    def mamba_width(self, layer: int) -> int:
        """Inner width of the Mamba branch of layer `layer`."""
        return self.heads(layer).mamba * self.mamba_head_dim or self.mamba_inner_size  # version 1 counts no heads

    def heads(self, layer: int) -> LayerHeads:
        """How many heads layer `layer` has, of each kind."""
        return heads_of_layer(self, layer)

    def layer_window(self, layer: int) -> int:
        """Window of layer `layer`'s local heads, in tokens."""
        if self.attention_type == "pyramidal":
            return self.window_size * 2 ** (3 * layer // self.num_layers)
        return self.window_size
