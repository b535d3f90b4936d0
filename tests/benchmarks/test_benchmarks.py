"""The benchmark scripts, run as a user runs them, at a size that takes seconds."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

import warm

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
TINY = ("--size", "tiny", "--threads", "1", "--dtype", "float32")


def run_script(name: str, *arguments: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [warm.python(), BENCHMARKS / name, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other from their own directory."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    documents = [f"Document {i}: " + " ".join(f"{n} times {i} is {n * i}." for n in range(40)) for i in range(12)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


def test_quality_records_each_run_once_and_reports_them(
    corpus: Path, tmp_path: Path, benchmark_modules: None, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--results", str(tmp_path), "--corpus", "numbers")
    settings = (*TINY, *where, "--train", str(corpus), "--valid", str(corpus), "--cache", str(tmp_path / "cache"))
    settings += ("--steps", "2", "--warmup", "1", "--length", "64", "--learning-rates", "1e-3")
    first = run_script("quality.py", *settings, "--models", "fusiontree", "llama")
    assert first.returncode == 0, first.stderr
    path = tmp_path / "quality_numbers.jsonl"
    ours, llama = (json.loads(line) for line in path.read_text().splitlines())
    assert (ours["run"]["model"], llama["run"]["model"]) == ("fusiontree", "llama")
    assert ours["run"]["data"] == llama["run"]["data"]
    assert abs(ours["parameters"] / llama["parameters"] - 1) < 0.1
    for record in (ours, llama):
        # Untrained is uniform over 300 tokens; two steps move it a little.
        assert abs(record["val_loss"] - math.log(300)) < 0.7
        assert record["train_tokens_per_second"] > 0
        assert str(tmp_path) not in json.dumps(record)

    import quality

    quality.main([*settings, "--models", "llama"])
    assert "recorded already" in capsys.readouterr().out
    assert len(path.read_text().splitlines()) == 2

    quality.main([*where, "--report"])
    assert f"| Llama | 0 | float32 | {llama['parameters'] / 1e6:.2f} M |" in path.with_suffix(".md").read_text()

    if hasattr(torch.optim, "Muon"):
        quality.main([*settings, "--models", "llama", "--optimizer", "muon"])
        *_, muon = (json.loads(line) for line in path.read_text().splitlines())
        assert muon["run"] == llama["run"] | {"optimizer": "muon"} and muon["val_loss"] != llama["val_loss"]

    quality.main([*settings, "--models", "fusiontree", "--z-loss", "0.1"])
    *_, with_z_loss = (json.loads(line) for line in path.read_text().splitlines())
    assert with_z_loss["run"] == ours["run"] | {"z_loss": 0.1} and with_z_loss["val_loss"] != ours["val_loss"]
    assert with_z_loss["command"].endswith("--models fusiontree --z-loss 0.1")

    path.write_text(json.dumps(ours | {"revision": "0" * 12}) + "\n")
    with pytest.raises(SystemExit, match="revision 000000000000"):
        quality.main([*settings, "--models", "fusiontree"])


def test_variants_are_recorded_beside_the_default_and_keep_the_size(
    corpus: Path, tmp_path: Path, benchmark_modules: None
) -> None:
    import candidates
    import quality
    from variants import VARIANTS

    settings = [
        "--results",
        str(tmp_path),
        "--corpus",
        "numbers",
        *TINY,
        "--train",
        str(corpus),
        "--valid",
        str(corpus),
    ]
    settings += ["--cache", str(tmp_path / "cache"), "--steps", "1", "--length", "16", "--learning-rates", "1e-3"]
    quality.main([*settings, "--models", "fusiontree", "--variants", "default", "gate 0.5", "MLP from z"])
    found = [json.loads(line) for line in (tmp_path / "quality_numbers.jsonl").read_text().splitlines()]
    assert [record["run"].get("variant") for record in found] == [None, "gate 0.5", "MLP from z"]
    assert len({record["val_loss"] for record in found}) == 3
    assert "| FusionTree: gate 0.5 | 0 | float32 |" in quality.write_report(tmp_path / "quality_numbers.jsonl")

    rows = candidates.Rows(*(torch.randint(1, 300, (1, 280)) for _ in range(3)))
    rows.position_ids[:] = torch.arange(280)  # further than the window
    losses = {}
    for variant in VARIANTS:
        candidate = candidates.build("fusiontree", candidates.SIZES["6.6M"], seed=0, variant=variant)  # checks the size
        candidate.training_loss(rows, candidates.StepTotals(labels=279, rows=1, tokens=280)).backward()
        without = [n for n, p in candidate.model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not without, variant
        losses[variant] = candidate.logits(rows).detach().sum().item()
    assert len(set(losses.values())) == len(VARIANTS)  # each is another model


def test_recall_measures_branches_of_equal_size(tmp_path: Path, benchmark_modules: None) -> None:
    settings = ("--results", str(tmp_path), "--threads", "1", "--steps", "2", "--batch-size", "4", "--length", "32")
    settings += ("--pairs", "4", "--vocab-size", "64", "--learning-rates", "1e-3")
    done = run_script("recall.py", *settings, "--branches", "both", "mamba", "attention")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "recall.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["run"]["branches"] for record in found] == ["both", "mamba", "attention"]
    sizes = [record["parameters"] for record in found]
    assert max(sizes) / min(sizes) < 1.03
    assert all(0 <= record["accuracy"] < 0.5 and len(record["curve"]) == 2 for record in found)

    import recall

    recall.main([*settings, "--branches", "both"])
    assert len(path.read_text().splitlines()) == 3  # recorded already
    assert "| 3 x attention | 0 |" in recall.report(path) and "| 2 x both | 0 |" in path.with_suffix(".md").read_text()
    assert "--pairs 4 --vocab-size 64" in found[0]["command"]
    path.write_text(json.dumps(found[0] | {"revision": "0" * 12}) + "\n")
    with pytest.raises(SystemExit, match="revision 000000000000"):
        recall.main([*settings, "--branches", "both"])


def test_recall_finds_passkeys_at_each_length(tmp_path: Path, benchmark_modules: None) -> None:
    import recall

    settings = ("--task", "passkey", "--results", str(tmp_path), "--threads", "1", "--steps", "2", "--batch-size", "2")
    settings += ("--length", "32", "--vocab-size", "64", "--learning-rates", "1e-3", "--branches", "both")
    recall.main([*settings])
    path = tmp_path / "recall.jsonl"
    (found,) = (json.loads(line) for line in path.read_text().splitlines())
    grid = found["grid"]
    assert grid["lengths"] == [32, 64, 128, 256] and len(grid["found"]) == len(grid["depths"]) == 5
    assert all(0 <= share < 0.5 for depth in grid["found"] for share in depth)
    assert "| layers | 32 tokens | 64 tokens | 128 tokens | 256 tokens |" in recall.report(path)


def test_recall_goes_from_easy_rows_to_those_that_are_asked(benchmark_modules: None) -> None:
    import recall

    mqar = recall.MQARTask(length=256, pairs=16, vocab_size=128)
    assert [(stage.pairs, stage.length) for stage in recall.stages(mqar)] == [(4, 16), (8, 32), (16, 64), (16, 256)]
    passkey = recall.PasskeyTask(length=256)
    assert [stage.length for stage in recall.stages(passkey)] == [16, 32, 64, 256]
    for task in (mqar, passkey):
        first, second = (recall.draw(task, 4, step, seed=0).input_ids for step in (1, 2))
        assert torch.equal(first, recall.draw(task, 4, 1, seed=0).input_ids) and not torch.equal(first, second)


def test_long_context_measures_every_range_of_positions(
    corpus: Path, tmp_path: Path, benchmark_modules: None, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*TINY, "--results", str(tmp_path), "--corpus", "numbers", "--cache", str(tmp_path / "cache"))
    settings += ("--train", str(corpus), "--valid", str(corpus), "--steps", "2", "--warmup", "1", "--length", "32")
    done = run_script("long_context.py", *settings, "--variants", "learned", "none", "attention-theta-1e6")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "long_context_numbers.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["run"]["variant"] for record in found] == ["learned", "none", "attention-theta-1e6"]
    for record in found:
        whole, fresh = record["loss_by_range"], record["loss_of_fresh_pieces"]
        assert len(whole) == len(fresh) == 8 and whole[0] == pytest.approx(fresh[0], abs=1e-3)
        assert whole[1:] != fresh[1:] and all(abs(loss - math.log(300)) < 1.5 for loss in whole)
        assert str(tmp_path) not in json.dumps(record)

    import long_context

    long_context.main([*settings, "--variants", "none"])
    assert "recorded already" in capsys.readouterr().out and len(path.read_text().splitlines()) == 3
    assert f"| learned | {found[0]['parameters'] / 1e6:.2f} M |" in long_context.report(path)
    path.write_text(json.dumps(found[0] | {"revision": "0" * 12}) + "\n")
    with pytest.raises(SystemExit, match="revision 000000000000"):
        long_context.main([*settings, "--variants", "none"])


def test_long_rows_are_text_without_ends_of_documents(benchmark_modules: None) -> None:
    import long_context
    import numpy as np

    rows = long_context.long_rows(np.array([5, 6, 0, 7, 8, 9, 0, 4]), 3, most=9)
    assert rows.tolist() == [[5, 6, 7], [8, 9, 4]]
    size = long_context.SIZES["tiny"]
    model = long_context.make("none", size, length=16, seed=0).model.eval()
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        proj = model.srte.proj.weight
        assert not proj.any() and not proj.requires_grad
        without = model(ids).logits
        model.srte.proj.weight.fill_(1.0)
        assert not torch.equal(model(ids).logits, without)


def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, benchmark_modules: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import candidates
    import numpy as np
    import packed_text
    import training_run

    monkeypatch.setattr(training_run, "EVAL_EVERY", 1)
    rows = packed_text.pack(np.random.default_rng(0).integers(1, 300, 40 * 16), 16)
    recipe = training_run.Recipe(
        learning_rate=2e-3, steps=3, warmup=1, batch_size=4, micro_batch=2, seed=0, dtype="float32"
    )
    size = candidates.SIZES["tiny"]
    whole = training_run.train(candidates.build("llama", size, seed=0), recipe, rows, rows, tmp_path / "whole.pt")

    class Interrupted(Exception):
        pass

    def stop_after(steps: int) -> candidates.Candidate:
        candidate = candidates.build("llama", size, seed=0)
        pieces = iter(range(2 * steps))

        def training_loss(*arguments: object) -> torch.Tensor:
            if next(pieces, None) is None:
                raise Interrupted
            return candidate.training_loss(*arguments)

        return candidates.Candidate(candidate.title, candidate.model, candidate.logits, training_loss)

    unfinished = tmp_path / "half.pt"
    with pytest.raises(Interrupted):
        training_run.train(stop_after(2), recipe, rows, rows, unfinished)
    resumed = training_run.train(candidates.build("llama", size, seed=1), recipe, rows, rows, unfinished)
    assert (resumed["val_curve"], resumed["val_loss"]) == (whole["val_curve"], whole["val_loss"])
    assert not unfinished.exists()


def test_speed_records_rates_ratios_and_memory(tmp_path: Path) -> None:
    settings = (*TINY, "--shapes", "32x2", "--rounds", "1", "--steps", "1", "--results", tmp_path)
    finished = run_script("speed.py", *settings, "--models", "fusiontree", "llama")
    assert finished.returncode == 0, finished.stderr
    (path,) = tmp_path.glob("speed_*.json")
    (record,) = json.loads(path.read_text())
    ours, llama = record["summary"]
    assert (ours["model"], llama["model"]) == ("fusiontree", "llama")
    ratio = ours["tokens_per_second"]["train"] / llama["tokens_per_second"]["train"]
    assert ours["ratios"]["train_to_llama"] == pytest.approx(ratio, rel=0.01)
    # Parameters, gradients and two moments in float32 at the least.
    assert ours["peak_bytes"] > 4 * 4 * ours["parameters"]
    assert "FusionTree" in path.with_suffix(".md").read_text()
    assert str(tmp_path) not in path.read_text()


def test_memory_counts_what_each_scope_saves_and_times_it(tmp_path: Path) -> None:
    settings = (*TINY, "--shape", "128x1", "--rounds", "1", "--no-recipe", "--results", tmp_path)
    finished = run_script("memory.py", *settings)
    assert finished.returncode == 0, finished.stderr
    (path,) = tmp_path.glob("memory_*.json")
    (record,) = json.loads(path.read_text())
    scopes = record["scopes"]
    assert list(scopes) == ["off", "mamba", "attention", "branches", "block"]
    saved = {scope: found["saved"] for scope, found in scopes.items()}
    assert saved["block"] < saved["branches"] < min(saved["mamba"], saved["attention"])
    assert max(saved["mamba"], saved["attention"]) < saved["off"]
    assert all(found["saved"] < found["held"] < found["peak"] and found["time_to_off"] > 0 for found in scopes.values())
    off = scopes["off"]
    assert off["peak_of_process"] > off["peak"]
    assert 0.8 * off["saved"] < sum(off["largest"].values()) <= off["saved"]
    bytes_of = {(name, scope): sizes for name, scope, sizes in record["variants"]}
    # 2 layers of 4 heads keep softmax weights [128, 128] in place of outputs [128, 32] and log-sum-exps [128], float32;
    # a table is cos and sin, 256 x 16 each, of which a layer keeps its 128 rows; the shared ones are kept once.
    assert bytes_of["scores", "off"]["saved"] - off["saved"] == 2 * 4 * (128 * 128 - 128 * 32 - 128) * 4
    assert bytes_of["own tables", "off"]["held"] - off["held"] == (2 * 2 * 256 * 16 + 2 * 128 * 16) * 4
    assert "| block |" in path.with_suffix(".md").read_text()
    assert str(tmp_path) not in path.read_text()


def test_breakdown_gives_every_operation_of_a_step_to_one_kind(tmp_path: Path, benchmark_modules: None) -> None:
    import breakdown

    settings = [*TINY, "--shapes", "64x2", "--steps", "1", "--results", str(tmp_path)]
    breakdown.main(settings)
    (file,) = tmp_path.glob("breakdown_*.json")
    (record,) = json.loads(file.read_text())
    ours, llama = record["found"]
    for one in (ours, llama):
        kinds = one["kinds"]
        assert sum(kinds.values()) == pytest.approx(one["seconds"], rel=0.3)
        assert kinds["matrix products"] > 0 and kinds["attention"] > 0 and kinds["optimizer and clipping"] > 0
        # 0.6 million parameters at least in matrices, six operations for each and token.
        assert one["floor_seconds"] * one["operations_per_second"] > 6 * 600_000 * 128
    assert ours["kinds"]["convolution"] > 0 == llama["kinds"]["convolution"]
    assert ours["kinds"]["scan"] > 0 == llama["kinds"]["scan"]
    assert min(ours["kinds"]["loss"], llama["kinds"]["loss"]) > 0
    names = {
        "aten::add_": "element-wise operations and sums",
        "aten::addmm": "matrix products",
        "aten::expand": breakdown.OTHERS,
        "_BlockAttentionBackward": "attention",
        "_CausalConv": "convolution",
        "_SwiGLUBackward": "gated mix and product",
        "aten::_log_softmax": "loss",
        "aten::native_layer_norm_backward": "norms",
    }
    assert {name: breakdown.kind_of(name) for name in names} == names
    assert "| the matrix products at best |" in file.with_suffix(".md").read_text()


def test_breakdown_counts_what_the_loss_calls_as_loss(benchmark_modules: None) -> None:
    import breakdown
    from torch.profiler import ProfilerActivity, profile

    from fusiontree.ops import linear_cross_entropy

    hidden, weight = torch.randn(1, 64, 32, requires_grad=True), torch.randn(100, 32, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        linear_cross_entropy(hidden, weight, torch.zeros(1, 64, dtype=torch.long)).backward()
    kinds = {event.name: breakdown.kind_of_event(event) for event in watched.events()}
    assert kinds["aten::_softmax"] == kinds["aten::amax"] == kinds["_LinearCrossEntropy"] == "loss"
    assert kinds["aten::mm"] == "matrix products"


def test_decoding_records_the_cost_of_context(tmp_path: Path, benchmark_modules: None) -> None:
    import decoding

    settings = [*TINY, "--contexts", "48", "16", "--rounds", "2", "--steps", "2", "--results", str(tmp_path)]
    for _ in range(2):  # the second record of equal settings takes the place of the first
        decoding.main(settings)
    (record,) = (json.loads(line) for line in (tmp_path / "decoding.jsonl").read_text().splitlines())
    short, long = record["contexts"]
    assert (short["context"], long["context"]) == (16, 48)
    assert short["token_seconds"] > 0 and record["copy_bytes_per_second"] > 0
    # Two layers, two global heads of width 32, keys and values in float32.
    assert record["global_bytes_per_token"] == 2 * 2 * 2 * 32 * 4
    assert long["state_bytes"] - short["state_bytes"] == 32 * record["global_bytes_per_token"]
    assert math.isfinite(long["extra_over_copy"]) and short["extra_over_copy"] is None
    assert "| 48 |" in (tmp_path / "decoding.md").read_text()
    assert str(tmp_path) not in (tmp_path / "decoding.jsonl").read_text()


@pytest.mark.parametrize("name", ["fusiontree", "llama"])
def test_documents_of_a_row_do_not_see_each_other(benchmark_modules: None, name: str) -> None:
    import candidates
    import numpy as np
    import packed_text

    torch.manual_seed(0)
    stream = np.arange(1, 33)
    stream[11] = packed_text.END_ID
    rows = packed_text.pack(stream, 32)
    candidate = candidates.build(name, candidates.SIZES["tiny"], seed=0)
    candidate.model.eval()
    with torch.no_grad():
        before = candidate.logits(rows)
        rows.input_ids[0, 3] = 99
        after = candidate.logits(rows)
    assert (before[0, 3:11] != after[0, 3:11]).any()
    torch.testing.assert_close(after[0, 12:], before[0, 12:], atol=1e-5, rtol=0)


def test_packing_counts_every_token_but_the_first_of_rows_and_documents(benchmark_modules: None) -> None:
    import numpy as np
    import packed_text

    rows = packed_text.pack(np.array([5, 6, packed_text.END_ID, 7, 8, 9, packed_text.END_ID]), 4)
    assert rows.input_ids.tolist() == [[5, 6, 0, 7], [8, 9, 0, 0]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 2, 0]]
    assert rows.labels.tolist() == [[-100, 6, 0, -100], [-100, 9, 0, -100]]


@pytest.mark.slow
def test_pruning_goes_from_a_parent_to_every_table(tmp_path: Path, benchmark_modules: None) -> None:
    (tmp_path / "data").mkdir()
    for name, first in (("train", 0), ("valid", 60), ("test", 90)):
        texts = [" ".join(f"{n} times {i} is {n * i}." for n in range(60)) for i in range(first, first + 30)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / "data" / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    folders = ("--data", tmp_path / "data", "--results", tmp_path, "--work", tmp_path / "work")
    sizes = ("--steps", "8", "--batch-size", "2", "--length", "64", "--context", "64", "--rounds", "1")
    amounts = ("--calibration-tokens", "1500", "--report-tokens", "1000", "--plain-layers", "1")
    amounts += ("--frontier", "1.2", "1.5", "--heal-frontier")
    done = run_script("pruning.py", *folders, *TINY, *sizes, *amounts)
    assert done.returncode == 0, done.stderr
    runs = [json.loads(line)["run"] for line in (tmp_path / "pruning_tiny.jsonl").read_text().splitlines()]
    stages = {"parent", "criteria", "frontier", "heal", "difference", "commit", "recall", "costs"}
    assert {run["stage"] for run in runs} == stages
    healed = [run["model"] for run in runs if run["stage"] == "heal"]
    rivals = ["plain smaller", "plain within-budget", "plain 1-layers"]
    assert healed == ["healed", "parent continued", "healed", "healed", "healed", *rivals]
    assert [run["model"] for run in runs if run["stage"] == "difference"] == [
        "parent continued",
        *(f"healed: random-{seed}" for seed in range(3)),
        *rivals,
    ]
    frontier = [run for run in runs if run["stage"] == "frontier"]
    assert {run["decode"] for run in frontier} == {1.2, 1.5} and any(run.get("healed") for run in frontier)
    shown = (tmp_path / "pruning_tiny.md").read_text()
    for title in (
        "What the branches are worth",
        "Criteria at equal saving",
        "frontier",
        "rivals",
        "Against the healed cut",
        "Gates that commit",
        "taught to look things up",
        "Measured in one run",
    ):
        assert title in shown
    again = run_script("pruning.py", *folders, *TINY, *sizes, *amounts, "--stages", "criteria")
    assert again.stdout.count("recorded already") == 11
    # Another seed is another study.
    other = ("--data", tmp_path / "data", "--results", tmp_path, "--work", tmp_path / "other", "--seed", "1")
    assert run_script("pruning.py", *other, *TINY, *sizes, *amounts, "--stages", "parent").returncode == 0
    losses = [
        json.loads((tmp_path / f"pruning_tiny{name}.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("", "_seed1")
    ]
    assert losses[0] != losses[1] and "; seed 1\n" in (tmp_path / "pruning_tiny_seed1.md").read_text()


@pytest.mark.slow  # five servers, of which each imports torch
def test_serving_answers_right_under_load_and_records_what_it_costs(tmp_path: Path) -> None:
    sizes = ["--streams", "4", "--seconds", "4", "--pool", "4", "--prompt-tokens", "24", "--new-tokens", "12"]
    sizes += ["--rounds", "2", "--requests", "4", "--singles", "2", "--long-share", "0.3", "--long-tokens", "1200"]
    sizes += ["--shared-tokens", "600", "--questions", "3", "--context", "600"]
    finished = run_script("serving.py", *TINY, *sizes, "--results", tmp_path)
    assert finished.returncode == 0, finished.stderr
    (path,) = tmp_path.glob("serving_*.json")
    (record,) = json.loads(path.read_text())
    load, throughput, prefix, state = (record["results"][task] for task in ("load", "throughput", "prefix", "state"))
    assert load["outcomes"]["complete"] > 0 and "lost" not in load["outcomes"] and "wrong" not in load["verdicts"]
    seen = load["outcomes"]["complete"] + load["outcomes"].get("left", 0)
    assert sum(load["verdicts"].values()) == seen  # none of a stream that was left before any text
    assert (load["long_prompts"], load["longest_prompt"] > 300) == (2, True)
    assert load["left_behind"] == {"batch_size": 0, "queue_length": 0, "state_bytes": 0}
    assert min(throughput[name] for name in ("at_once", "one_by_one", "falcon_h1_generate")) > 0
    assert len(throughput["rounds"]) == 2
    assert sum(prefix["verdicts"].values()) == 3 and "wrong" not in prefix["verdicts"]
    assert prefix["first_token_with"] < prefix["first_token_without"]
    # Llama keeps keys and values of 2 layers of width 128 in float32.
    assert state["llama"] == 2 * 2 * 128 * 600 * 4 and state["fusiontree"] < state["llama"]
    assert "| at once to one by one |" in path.with_suffix(".md").read_text()
    assert str(tmp_path) not in path.read_text()


def test_predicted_memory_is_compared_with_a_real_run(tmp_path: Path) -> None:
    done = run_script("memory_prediction.py", "--results", tmp_path, "--sizes", "small", "--engines", "single")
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(next(tmp_path.glob("memory_prediction_*.json")).read_text())
    (row,) = record["rows"]
    assert row["predicted"]["peak"] == pytest.approx(row["measured"]["peak"], rel=0.15)
    # Parameters, gradients and two moments are there at least.
    assert row["measured"]["peak"] > 16 * row["predicted"]["parameters"]
    assert record["recipe"]["peak"] < 35e9
    assert (
        f"| small | single | {row['predicted']['parameters'] / 1e6:.1f} M |" in next(tmp_path.glob("*.md")).read_text()
    )


def test_overhead_is_measured_in_turns(tmp_path: Path) -> None:
    small = ("model.hidden_size=32", "model.num_layers=1", "model.num_heads=4", "model.mamba_head_dim=8")
    small += ("training.max_seq_length=32", "model.window_size=8")
    rounds = ("--rounds", "2", "--steps", "1", "--threads", "1", "--results")
    done = run_script("overhead.py", *small, *rounds, tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(next(tmp_path.glob("overhead_*.json")).read_text())
    assert len(record["rounds"]) == 2 and len(record["saves"]) == 1
    assert all(seconds["cpu"] > 0 for one in record["rounds"] for seconds in one.values())
    assert "| engine over a bare loop | " in next(tmp_path.glob("overhead_*.md")).read_text()


@pytest.mark.slow
def test_the_recipe_in_small_is_trained_killed_resumed_judged_and_used(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "wikitext2"
    folder.mkdir(parents=True)
    for name, first in (("train", 0), ("valid", 60), ("test", 90)):
        texts = [" ".join(f"{n} times {i} is {n * i}." for n in range(60)) for i in range(first, first + 30)]
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    small = ("model.hidden_size=96", "model.num_layers=2", "model.mamba_head_dim=16", "training.mixed_precision=no")
    small += ("training.max_seq_length=32", "training.eval_batches=2")
    sizes = ("--steps", "20", "--rounds", "1", "--data", tmp_path / "data", "--results", tmp_path)
    done = run_script("pretrain_small.py", *small, *sizes)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "pretrain_small.json").read_text())
    assert record["resumed_from"] <= record["killed_after"] < 20 == record["losses"][-1][0]
    assert record["evaluations"][-1][1] < record["evaluations"][0][1]
    assert [step for step, *_ in record["gates"]] == [1, 10, 20]
    assert all(len(seconds) == 1 for seconds in record["seconds_per_step"].values())
    assert "The history of" in (tmp_path / "pretrain_small.md").read_text()


def test_quantized_prints_bytes_and_speed_of_each_form() -> None:
    done = run_script("quantized.py", *TINY, "--context", "16", "--steps", "2", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    sizes = {name: float(size) for name, size in re.findall(r"^\| (\w+) \| ([\d.]+) \|", done.stdout, re.M)}
    assert sizes.keys() == {"float32", "int8", "int4"}
    assert sizes["int8"] < sizes["float32"] and sizes["int4"] < sizes["float32"]
