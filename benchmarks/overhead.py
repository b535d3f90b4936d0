"""What the training engine costs beside a bare loop of the same model, and what its monitor and checkpoints cost.

    python benchmarks/overhead.py                     # the shape of configs/quickstart.yaml
    python benchmarks/overhead.py --rounds 40 --threads 2

The bare loop is what one writes by hand: the same data loader, forward, the same loss, backward, clipping, fused AdamW.
Beside it, in the same process and in turns, the engine without gate monitor, and the engine that records its gates at
every step, from which follows what that costs at the default interval. Checkpoints are saved between the rounds.
Records go to `results/overhead_<cpu>.json`, with a table in the `.md` beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import records
import torch

from fusiontree import HybridLanguageModel
from fusiontree.data import build_loader, load_tokenizer
from fusiontree.data.bpe import train_bpe
from fusiontree.data.embedded import write_embedded_corpus
from fusiontree.train.engine import TrainingEngine
from fusiontree.train.losses import HybridModelLoss, StepTotals
from fusiontree.train.optim import build_optimizers, learning_rate_at, set_learning_rate
from fusiontree.train.settings import RunSettings, load_run_settings
from fusiontree.train.setup import autocast, model_config, seed_model
from fusiontree.train.stop import StopRequest

CONFIG = records.REPOSITORY / "configs" / "quickstart.yaml"
#: As shares of a step: the engine over the bare loop, the monitor and checkpoints at their default intervals.
BARS = {"engine": 0.03, "monitor": 0.02, "checkpoints": 0.05}
DEFAULTS = RunSettings()


def settings_of(name: str, work: Path, overrides: list[str], *, monitored: bool) -> RunSettings:
    """A run that is never evaluated and saved at its end alone, with a row of its log every ten steps."""
    own = [f"output_dir={work / name}", f"data.train_paths={work / 'train.jsonl'}", "data.eval_paths=[]"]
    own += [f"data.tokenizer={work / 'tokenizer'}", "training.max_steps=1000000", "training.eval_interval=0"]
    own += ["training.save_interval=0", "training.log_interval=10", "logging.progress=none", "system.device=cpu"]
    own += [f"gate_monitor.enabled={str(monitored).lower()}", "gate_monitor.interval=1"]
    return load_run_settings(CONFIG, [*own, *overrides])


class BareLoop:
    """The loop written by hand."""

    def __init__(self, settings: RunSettings):
        self.settings = settings
        tokenizer = load_tokenizer(settings.data.tokenizer)
        seed_model(settings.seed)
        self.model = HybridLanguageModel(model_config(settings, tokenizer)).train()
        (self.optimizer,) = build_optimizers(self.model, settings.training)
        self.loss = HybridModelLoss(settings.loss)
        t = settings.training
        loader = build_loader(
            settings.data, tokenizer, batch_size=t.batch_size, max_seq_length=t.max_seq_length, seed=settings.seed
        )
        self.batches, self.step, self.last_loss = iter(loader), 0, 0.0

    def __call__(self) -> None:
        self.step += 1
        batch, t = next(self.batches), self.settings.training
        with autocast(self.settings, torch.device("cpu")):
            output = self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels)
            loss = self.loss(output, batch, StepTotals.of(StepTotals.local([batch]))).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip)
        set_learning_rate(self.optimizer, learning_rate_at(self.step, t))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.last_loss = loss.item()


class EngineLoop:
    """The engine, a step at a time."""

    def __init__(self, settings: RunSettings):
        self.engine = TrainingEngine(settings)
        self._steps = self.engine.steps(StopRequest())

    def __call__(self) -> None:
        next(self._steps)

    def save(self) -> float:
        """Seconds that a checkpoint takes; each is a new one, in a directory of its own."""
        started = time.perf_counter()
        self.engine.saver.save(self.engine.view.warn)
        return time.perf_counter() - started


def timed(step: Callable[[], None], count: int) -> dict[str, float]:
    """Seconds of a step by the wall's clock and by the processor's, mean of `count` steps one after the other."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    return {"wall": (time.perf_counter() - wall) / count, "cpu": (time.process_time() - cpu) / count}


def measure(options: argparse.Namespace, work: Path) -> dict:
    """Seconds of a step of each loop in every round, and of checkpoints."""
    write_embedded_corpus(work, 3_000_000)
    train_bpe([str(work / "train.jsonl")], 2048, str(work / "tokenizer"), "text")
    bare = BareLoop(settings_of("bare", work, options.settings, monitored=False))
    plain = EngineLoop(settings_of("plain", work, options.settings, monitored=False))
    watched = EngineLoop(settings_of("watched", work, options.settings, monitored=True))
    loops = {"bare": bare, "engine": plain, "engine, every step recorded": watched}
    for loop in loops.values():
        timed(loop, 2)
    rounds, saves = [], []
    for number in range(options.rounds):
        names = list(loops)
        names = names[number % 3 :] + names[: number % 3]
        rounds.append({name: timed(loops[name], options.steps) for name in names})
        if number % 4 == 0:
            saves.append(plain.save())
        shown = "  ".join(f"{name} {1000 * seconds['wall']:.1f} ms" for name, seconds in rounds[-1].items())
        print(f"round {number + 1}: {shown}", flush=True)
    for loop in (plain, watched):
        loop.engine.close()
    parameters = sum(parameter.numel() for parameter in bare.model.parameters())
    return {"parameters": parameters, "rounds": rounds, "saves": saves}


def shares(record: dict, clock: str) -> dict[str, float]:
    """Medians over the rounds, as shares of a step."""
    rounds, t = record["rounds"], DEFAULTS.training

    def ratio(one: str, other: str) -> float:
        return median(r[one][clock] / r[other][clock] for r in rounds) - 1

    each = ratio("engine, every step recorded", "engine")
    step = median(r["engine"]["wall"] for r in rounds)
    return {
        "engine": ratio("engine", "bare"),
        "record": each,
        "monitor": each / DEFAULTS.gate_monitor.interval,
        "checkpoints": median(record["saves"]) / (t.save_interval * step),
    }


def report(runs: list[dict]) -> str:
    """Markdown tables of the records."""
    d = DEFAULTS
    lines = ["# Overhead of the training engine", ""]
    for run in runs:
        step = median(r["bare"]["wall"] for r in run["rounds"])
        wall, cpu = shares(run, "wall"), shares(run, "cpu")
        lines += [
            f"{run['parameters'] / 1e6:.1f} M parameters, {run['tokens']} tokens a step, {1000 * step:.0f} ms a step "
            f"of the bare loop; medians of {len(run['rounds'])} rounds of {run['settings']['steps']} steps.",
            "",
            "| share of a step | wall clock | processor time | bar |",
            "|---|---|---|---|",
            f"| engine over a bare loop | {wall['engine']:+.1%} | {cpu['engine']:+.1%} | {BARS['engine']:.0%} |",
            f"| recording the gates, in a step that does | {wall['record']:+.1%} | {cpu['record']:+.1%} | |",
            f"| the same at its default interval of {d.gate_monitor.interval} steps | {wall['monitor']:+.2%} "
            f"| {cpu['monitor']:+.2%} | {BARS['monitor']:.0%} |",
            f"| a checkpoint of {1000 * median(run['saves']):.0f} ms every {d.training.save_interval} steps "
            f"| {wall['checkpoints']:+.2%} | | {BARS['checkpoints']:.0%} |",
            "",
        ]
    return "\n".join(lines) + "\n" + records.origin(runs)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of the run that differ")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=3, help="of each loop in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="directory of the records")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(options, Path(folder))
        t = settings_of("x", Path(folder), options.settings, monitored=False).training
    record = {
        "settings": {"overrides": options.settings, "steps": options.steps, "threads": options.threads},
        "tokens": t.batch_size * t.gradient_accumulation_steps * t.max_seq_length,
        **measured,
        "threads": options.threads,
        "revision": records.code_revision("models", "ops", "train", "data"),
        "command": " ".join(["python benchmarks/overhead.py", *records.shown_arguments(argv)]),
        **records.provenance(),
    }
    path = records.save_for_cpu(options.results, "overhead", record, report)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
