"""What the system figures count, checked against numbers known otherwise."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from fusiontree import HybridCache, HybridLanguageModel, HybridLanguageModelConfig, InputError
from fusiontree.eval.eval_system import BenchReport, BenchSettings, measure, stream_stamps, tensor_bytes
from fusiontree.eval.peers import PEERS, PeerSize, build_peer, count_parameters
from tiny_models import TINY

QUICK = BenchSettings(context=24, new_tokens=6, train_batch=2, train_length=16, rounds=2, dtype="float32")
# Wide enough that a peer's MLP has a width to choose.
CONFIG = HybridLanguageModelConfig(**(TINY | {"hidden_size": 64, "tie_word_embeddings": True}))


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_the_parameters_asked_for_and_the_papers_time_steps(name: str) -> None:
    size = PeerSize(vocab_size=512, hidden_size=128, num_layers=4, num_heads=2, parameters=1_300_000)
    model = build_peer(name, size, tolerance=0.06)
    assert abs(count_parameters(model) / size.parameters - 1) < 0.06
    steps = [torch.nn.functional.softplus(p) for n, p in model.named_parameters() if n.endswith("dt_bias")]
    assert bool(steps) == (name != "llama")
    assert all(((step > 0.99e-3) & (step < 1.01e-1)).all() for step in steps)


@pytest.fixture(scope="module")
def report() -> BenchReport:
    models = {
        "ours": HybridLanguageModel(CONFIG),
        **{name: build_peer(name, PeerSize.of(CONFIG), tolerance=0.1) for name in PEERS},
    }
    return measure(models, QUICK)


def test_every_model_has_every_figure_of_every_round(report: BenchReport) -> None:
    assert [model.name for model in report.models] == ["ours", "llama", "falcon_h1", "mamba2", "bamba"]
    for model in report.models:
        assert {name: len(values) for name, values in model.rounds.items()} == {
            "prefill": 2,
            "first_token": 2,
            "decode": 2,
            "train": 2,
        }
        assert model.prefill_tokens_per_second == pytest.approx(24 / (sum(model.rounds["prefill"]) / 2))
        assert model.first_token_seconds == pytest.approx(sum(model.rounds["first_token"]) / 2)
        assert model.decode_tokens_per_second == pytest.approx(sum(model.rounds["decode"]) / 2)
        assert model.train_tokens_per_second == pytest.approx(2 * 16 / (sum(model.rounds["train"]) / 2))
        assert model.parameter_bytes == 4 * model.parameters
        assert model.peak_bytes is None
    assert report.machine["device"] == "cpu" and report.machine["threads"] == torch.get_num_threads()


def test_peers_are_of_equal_size(report: BenchReport) -> None:
    sizes = {model.name: model.parameters for model in report.models}
    assert sizes["ours"] == count_parameters(HybridLanguageModel(CONFIG))
    # Mamba-2 grows by whole layers.
    assert all(abs(size / sizes["ours"] - 1) <= (0.1 if name == "mamba2" else 0.03) for name, size in sizes.items())


def test_state_is_what_the_caches_hold(report: BenchReport) -> None:
    ours, llama = (model.state_bytes for model in report.models[:2])
    cache = HybridCache(CONFIG, capacity=24 + 6)
    with torch.no_grad():
        HybridLanguageModel(CONFIG).eval()(torch.zeros(1, 29, dtype=torch.long), past_key_values=cache)
    # Beside the state itself the cache keeps each row's length and position.
    assert cache.nbytes <= ours <= cache.nbytes + 64
    # 29 tokens are read (the last new one is not), keys and values of 64 float32 in each of 2 layers.
    assert llama == 2 * 2 * 29 * 64 * 4


def test_the_report_comes_back_from_its_file(report: BenchReport, tmp_path: Path) -> None:
    report.save(tmp_path / "bench.json")
    assert BenchReport.load(tmp_path / "bench.json") == report


def test_models_that_are_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    settings = QUICK.model_copy(update={"train_batch": 0, "batch": 3, "dtype": "bfloat16", "rounds": 1})
    (model,) = measure({"ours": HybridLanguageModel(CONFIG)}, settings, seen.append).models
    assert model.train_tokens_per_second is None and "train" not in model.rounds
    assert model.parameter_bytes < 3 * model.parameters  # two bytes each, but for A_log, D and dt_bias
    assert seen == ["warm-up: ours", "round 1 of 1: ours"]
    assert model.prefill_tokens_per_second == pytest.approx(3 * 24 / model.rounds["prefill"][0])


def test_stamps_are_taken_as_tokens_come() -> None:
    class Slow(HybridLanguageModel):
        def forward(self, *arguments, **options):
            time.sleep(0.05)
            return super().forward(*arguments, **options)

    stamps, state = stream_stamps(Slow(CONFIG).eval(), torch.ones(2, 8, dtype=torch.long), 4)
    gaps = [after - before for before, after in zip(stamps, stamps[1:], strict=False)]
    assert len(gaps) == 4 and all(gap >= 0.05 for gap in gaps)
    assert state > 0


def test_memory_that_tensors_share_counts_once() -> None:
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=1))
    keys = torch.zeros(1, 2, 10, 8)
    cache.update(keys, keys[:, :, :5], 0)
    shared = torch.zeros(100)
    assert sum(tensor_bytes({"a": shared, "b": [shared[:10], shared.view(10, 10)]}).values()) == 400
    assert sum(tensor_bytes(cache).values()) >= keys.numel() * 4


def test_peers_that_cannot_be_built() -> None:
    with pytest.raises(InputError, match="there is no peer 'gpt'; there are llama, falcon_h1, mamba2, bamba"):
        build_peer("gpt", PeerSize.of(CONFIG))
    narrow = HybridLanguageModelConfig(
        **(TINY | {"hidden_size": 8, "mamba_expand": 1, "num_heads": 4, "num_layers": 1})
    )
    with pytest.raises(InputError, match=r"falcon_h1 of hidden size 8 .*comes no nearer to .* parameters than"):
        build_peer("falcon_h1", PeerSize.of(narrow))
