"""Small models that cover the combinations the laws must hold for, and the ways to feed them."""

from __future__ import annotations

import itertools

import pytest
import torch

from fusiontree import HybridLanguageModel, HybridLanguageModelConfig

VOCAB = 61
TOLERANCE = 1e-4  # float32, on logits of order 1
BF16_TOLERANCE = 0.15  # bfloat16 weights and activations: 8 bits of mantissa through 3 blocks, logits of order 1

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "global_heads": 2,
    "window_size": 5,
    "mamba_head_dim": 8,
    "mamba_state_size": 8,
    "gate_rank": 4,
    "srte_rank": 8,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _combinations() -> dict[str, dict]:
    found = {}
    for version, srte, attention, kv_heads, pruned in itertools.product(
        (1, 2), ("sincos", "learned"), ("local_global", "pyramidal"), (4, 2), (False, True)
    ):
        name = f"mamba{version}-{srte}-{attention}-kv{kv_heads}{'-pruned' if pruned else ''}"
        found[name] = {
            "mamba_version": version,
            "srte_encoding": srte,
            "attention_type": attention,
            "num_kv_heads": kv_heads,
            "layer_branches": ["both", "mamba", "attention"] if pruned else None,
            "mlp": "aligned" if (version == 2) == (srte == "learned") else "residual",
        }
    found["all-local"] = {"global_heads": 0}
    found["all-global"] = {"global_heads": 4}
    found["expand2-tied-linear-alignment"] = {"mamba_expand": 2, "tie_word_embeddings": True, "use_alignment": False}
    found["linear-alignment-merged"] = {  # a wide and a narrow branch
        "mlp": "aligned",
        "mamba_expand": 2,
        "tie_word_embeddings": True,
        "use_alignment": False,
        "layer_branches": ["mamba", "both", "attention"],
        "layer_gates": [False, True, False],
        "layer_merges": ["z", "none", "hz"],
    }
    found["gates-folded-and-a-constant-layer"] = {
        "num_layers": 4,
        "layer_branches": ["both", "constant", "mamba", "attention"],
        "layer_gates": [False, True, False, False],
    }
    found["heads-cut"] = {
        "layer_heads": [{"mamba": 3, "local": 1}, {"global": 0}, {"mamba": 5, "local": 0, "global": 1}],
    }
    found["heads-cut-kv2-pruned"] = {
        "num_kv_heads": 2,
        "num_layers": 4,
        "layer_branches": ["both", "mamba", "attention", "attention"],
        "layer_heads": [{"local": 0}, {"mamba": 1}, {"global": 0}, None],
    }
    found["maps-merged"] = {
        "num_layers": 4,
        "layer_branches": ["both", "mamba", "attention", "attention"],
        "layer_gates": [True, False, False, False],
        "layer_merges": ["none", "hz", "hz", "none"],
    }
    found["aligned-mlp-cut"] = {
        "mlp": "aligned",
        "num_layers": 5,
        "layer_branches": ["both", "both", "constant", "mamba", "attention"],
        "layer_gates": [True, False, True, False, False],
        "layer_merges": ["none", "none", "none", "z", "hz"],
    }
    found["window1-conv2"] = {"window_size": 1, "conv_kernel": 2}
    return found


COMBINATIONS = _combinations()
FEW = ["mamba2-sincos-local_global-kv4", "mamba1-learned-pyramidal-kv2-pruned", "mamba2-learned-pyramidal-kv2-pruned"]


def build(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> HybridLanguageModel:
    """A model whose every part matters: weights of order 1/sqrt(fan_in) and biases away from zero, since a fresh
    initialisation is so small that a broken branch would hardly show in the logits."""
    torch.manual_seed(seed)
    model = HybridLanguageModel(HybridLanguageModelConfig(**(TINY | overrides)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_bias")):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2 and "conv" not in name:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
            else:
                if name.endswith("ln_output.weight"):
                    parameter.fill_(1)  # the last one starts larger, which would scale the logits and their errors
                parameter.add_(0.3 * noise)
    return model.eval().to(dtype)


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def packed_positions(*rows: list[int]) -> torch.Tensor:
    """Positions of rows of packed documents, each given by its documents' lengths."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def random_cuts(length: int, pieces: int, generator: torch.Generator) -> list[int]:
    """Sizes of `pieces` random pieces of a sequence."""
    inner = sorted((torch.randperm(length - 1, generator=generator)[: pieces - 1] + 1).tolist())
    return [end - start for start, end in zip([0, *inner], [*inner, length], strict=True)]


def assert_states_equal(a, b, tolerance: float = TOLERANCE) -> None:
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.shape == right[name].shape, name
        difference = (value.float() - right[name].float()).abs().max().item() if value.numel() else 0.0
        assert difference <= tolerance * max(1.0, value.float().abs().max().item() if value.numel() else 1.0), name


@pytest.fixture(params=sorted(COMBINATIONS))
def any_model(request) -> HybridLanguageModel:
    return build(**COMBINATIONS[request.param])


@pytest.fixture(params=FEW)
def some_model(request) -> HybridLanguageModel:
    return build(**COMBINATIONS[request.param])


@pytest.fixture(params=FEW)
def bf16_model(request) -> HybridLanguageModel:
    return build(dtype=torch.bfloat16, **COMBINATIONS[request.param])


@pytest.fixture(autouse=True)
def _one_thread_no_grad():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
