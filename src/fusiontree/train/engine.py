"""The training loop, the only one: every engine that accelerate can prepare a model for runs through it."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, gather_object

from fusiontree.artifacts import RunManifest, checkpoint_name, make_directory
from fusiontree.config import dump_yaml
from fusiontree.data.batch import Batch
from fusiontree.data.loader import Loader, build_loader
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.train.checkpoint import (
    TrainingState,
    load_model,
    load_state,
    optimizer_tensors,
    remove_unfinished,
    restore_optimizer,
    restore_rng,
    rng_state,
    save_checkpoint,
)
from fusiontree.train.evaluation import TokenLoss, evaluate_loader
from fusiontree.train.loggers import JsonlLog, ProgressView
from fusiontree.train.losses import TERMS, HybridModelLoss, StepTotals
from fusiontree.train.meter import StepMeter
from fusiontree.train.monitor_gate import GateMonitor, mean_gate
from fusiontree.train.optim import build_optimizer, learning_rate_at, set_learning_rate
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import (
    check_system,
    checkpoint_to_resume,
    enable_gradient_checkpointing,
    model_config,
    require_steps_left,
    seed_everything,
    tokenizer_of,
)
from fusiontree.train.stop import StopRequest
from fusiontree.train.teacher import load_teacher
from fusiontree.train.throughput import Throughput
from fusiontree.train.trackers import MetricsLog, check_trackers


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    run: Path
    """Its directory."""
    step: int
    """Optimizer steps taken in all."""
    checkpoint: Path | None
    """The newest checkpoint."""
    evaluation: TokenLoss | None
    """The last evaluation of this process."""
    stopped_by: Signals | None = None
    """The signal that ended the run before `max_steps`."""


class TrainingEngine:
    """One run, from settings to its last checkpoint.

    Everything that can be wrong with the settings, the data or a checkpoint is found here, before the first step.

    Args:
        settings: the whole run.
        resume: None = a new run; "auto" = the run's newest checkpoint, if any; or the path of a checkpoint or run.

    Raises:
        InputError: anything that cannot be used, in one sentence.
    """

    def __init__(self, settings: RunSettings, resume: str | None = None):
        self.settings = settings
        self.run_directory = Path(settings.output_dir)
        check_trackers(settings.logging)
        device = check_system(settings.system)
        checkpoint = checkpoint_to_resume(self.run_directory, resume)
        state = load_state(checkpoint) if checkpoint else None
        if checkpoint and state:
            require_steps_left(settings, checkpoint, state.step)
        tokenizer = tokenizer_of(settings)
        config = model_config(settings, tokenizer)
        self.tokenizer = tokenizer
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            # Autocast is entered around the forward pass here, alike in every engine; parameters stay float32.
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=settings.training.gradient_accumulation_steps, sync_with_dataloader=False
            ),
        )
        self.lengths = settings.length_schedule(self.accelerator.num_processes)
        self.train_loader = self._loader("train")
        self.eval_loader = self._loader("eval") if self._evaluates else None
        seed_everything(settings.seed)
        model = load_model(checkpoint, config) if checkpoint else HybridLanguageModel(config)
        enable_gradient_checkpointing(model, settings.training.checkpointing_scope)
        model.to(self.accelerator.device)
        self.model, self.optimizer = self.accelerator.prepare(model, build_optimizer(model, settings.training))
        self.unwrapped: HybridLanguageModel = self.accelerator.unwrap_model(self.model)
        teacher = None
        if settings.loss.teacher is not None:
            teacher = load_teacher(settings.loss.teacher, tokenizer, config.vocab_size, self.accelerator.device)
        self.loss = HybridModelLoss(settings.loss, teacher)
        self.monitor = GateMonitor(settings.gate_monitor, config.num_layers, config.layer_branches)
        self.meter = StepMeter(settings.loss, Throughput(self.unwrapped, self.accelerator.device, settings))
        self.step = 0
        self.evaluated_step: int | None = None
        self.evaluation: TokenLoss | None = None
        self.checkpoint = checkpoint
        self.metrics = MetricsLog(self.run_directory)
        self.gates = JsonlLog(self.run_directory / "gates.jsonl")
        if state is not None:
            self._restore(state)
        self._open_run_directory(config.vocab_size)

    @property
    def _evaluates(self) -> bool:
        return self.settings.training.eval_interval > 0 and len(self.settings.data.eval_paths) > 0

    def _loader(self, split: str) -> Loader:
        return build_loader(
            self.settings.data,
            self.tokenizer,
            split=split,  # type: ignore[arg-type]
            batch_size=self.settings.training.batch_size,
            max_seq_length=self.settings.training.max_seq_length,
            seed=self.settings.seed,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _restore(self, state: TrainingState) -> None:
        self.train_loader.load_state_dict(state.loader)
        self.monitor.load_state_dict(state.gate_monitor)
        self.meter.load_state_dict(state.meter)
        self.step = state.step
        restore_optimizer(self.optimizer, state.tensors)
        restore_rng(state.tensors, state.python_rng)

    def _open_run_directory(self, vocab_size: int) -> None:
        """Make the directory, or drop from its logs what a resumed run is about to write again."""
        if not self.accelerator.is_main_process:
            return
        make_directory(self.run_directory, "output_dir")
        remove_unfinished(self.run_directory / "checkpoints")
        rows = self.metrics.truncate_after(self.step if self.checkpoint else -1)
        self.gates.truncate_after(self.step if self.checkpoint else -1)
        # A stop may have cut short the evaluation of the step it saved: the log knows.
        self.evaluated_step = max((row["step"] for row in rows if "eval_loss" in row), default=None)
        resolved = self.settings.model_dump(mode="json")
        resolved["model"]["vocab_size"] = vocab_size
        dump_yaml(resolved, self.run_directory / "config.yaml")
        manifest = self.run_directory / "manifest.json"
        if self.checkpoint is None or not manifest.exists():
            RunManifest.collect(
                resolved,
                data_fingerprint=self.train_loader.fingerprint(),
                parent_run=str(self.checkpoint) if self.checkpoint else None,
            ).save(manifest)
        self.metrics.open_trackers(self.settings.logging, resolved)

    def run(self) -> TrainResult:
        """Train until `max_steps`, or until SIGINT or SIGTERM asks to stop; either way the last step is saved.

        Raises:
            InputError: a loss or gradient that is not finite, a full disk, data that changed underneath.
        """
        t = self.settings.training
        self.model.train()
        self.view = ProgressView(
            self.settings.logging.progress, t.max_steps, self.step, visible=self.accelerator.is_main_process
        )
        try:
            with StopRequest() as stop:
                self._announce()
                self._evaluate_if_due(stop)
                batches = iter(self.train_loader)
                while self.step < t.max_steps and not stop:
                    self._train_step(batches)
                    if self.step % t.log_interval == 0 or self.step == t.max_steps:
                        self._log()
                    self._evaluate_if_due(stop)
                    if t.save_interval and self.step % t.save_interval == 0:
                        self._save()
                if self.step > 0 and not self._is_saved():
                    self._save()
                self._report_end(stop)
                return TrainResult(self.run_directory, self.step, self.checkpoint, self.evaluation, stop.signal)
        finally:
            self.view.close()
            self.metrics.close()
            self.gates.close()

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step. All its micro-batches are fetched first: each is weighted by its part of the whole."""
        t, step = self.settings.training, self.step + 1
        started = time.perf_counter()
        stage = self.lengths.at(step)
        self.train_loader.set_shape(stage.batch_size, stage.length)
        micro_batches = [next(batches) for _ in range(t.gradient_accumulation_steps)]
        totals = StepTotals.of(self._sum_over_ranks(StepTotals.local(micro_batches)))
        self.meter.count_operations(micro_batches)
        with_details = self.monitor.due(step)
        # accelerate divides by the number of micro-batches and averages over ranks; the shares already add up.
        scale = t.gradient_accumulation_steps * self.accelerator.num_processes
        sums = torch.zeros(len(TERMS) + 2, device=self.accelerator.device)
        for index, micro_batch in enumerate(micro_batches):
            batch = micro_batch.to(self.accelerator.device, non_blocking=True)
            self.unwrapped.set_dropout_key(self.settings.seed, step, index)
            with self.accelerator.accumulate(self.model):
                with self._autocast():
                    output = self.model(
                        input_ids=batch.input_ids,
                        position_ids=batch.position_ids,
                        labels=batch.labels,
                        output_gates=with_details,
                        output_hidden_states=self.loss.needs_hidden_states,
                    )
                    share = self.loss(output, batch, totals, self.unwrapped.lm_head.weight)
                self.accelerator.backward(share.total * scale)
            sums += torch.cat((share.terms, share.gates))
            if output.gate_stats.details is not None:
                self.monitor.update(output.gate_stats.details)
            del output, share
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), t.grad_clip or math.inf)
        values = torch.cat((self._sum_over_ranks(sums), grad_norm.reshape(1).to(sums))).tolist()
        self._require_finite(step, values)
        set_learning_rate(self.optimizer, learning_rate_at(step, t))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step = step
        self.meter.add(values, totals, learning_rate_at(step, t), time.perf_counter() - started)
        if with_details:
            self._record_gates(int(totals.tokens))
        self.view.step(step, self.meter.newest | self._length())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.accelerator.device.type,
            dtype=torch.bfloat16,
            enabled=self.settings.training.mixed_precision == "bf16",
        )

    def _sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor.to(self.accelerator.device), reduction="sum")

    def _require_finite(self, step: int, values: list[float]) -> None:
        names = (*TERMS, "gate sum", "gate weight", "gradient norm")
        wrong = [f"{name} {value}" for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        if wrong:
            last = self.checkpoint or "none yet"
            raise InputError(
                f"step {step} is not finite ({', '.join(wrong)}), training stopped before its update; last checkpoint: "
                f"{last}; lower training.learning_rate or lengthen training.warmup_steps"
            )

    def _record_gates(self, tokens: int) -> None:
        statistics = self.monitor.record(self.step, tokens, self.meter.tokens, self._sum_over_ranks)
        self.meter.gate_std = (mean_gate(statistics) or (None, None))[1]
        if self.accelerator.is_main_process:
            self.gates.write(statistics.dumps())

    def _log(self) -> None:
        row = self.meter.close_row(self.step) | self._length()
        if self.accelerator.is_main_process:
            self.metrics.write(row)
        remaining = self.settings.training.max_steps - self.step
        self.view.row(row, remaining * self.meter.seconds_per_step)

    def _length(self) -> dict[str, Any]:
        """The last step's tokens in a row, to show beside its other numbers; nothing where all rows are alike."""
        return {"length": self.train_loader.length} if self.lengths.varies else {}

    def _evaluate_if_due(self, stop: StopRequest) -> None:
        """At step 0, at every interval and at the end; also where a stop cut an evaluation short before resuming."""
        t = self.settings.training
        due = self.step % max(1, t.eval_interval) == 0 or self.step == t.max_steps
        if self.eval_loader is None or not due or self.evaluated_step == self.step:
            return
        with self._autocast():
            result = evaluate_loader(
                self.model,
                self.eval_loader,
                t.eval_batches,
                device=self.accelerator.device,
                reduce=self._sum_over_ranks,
                stop=lambda: bool(stop),
            )
        if result is None:
            return
        self.evaluation, self.evaluated_step = result, self.step
        row = {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_tokens": result.tokens}
        if self.accelerator.is_main_process:
            self.metrics.write({"step": self.step, **row})
        self.view.message(f"step {self.step}  eval loss {result.loss:.4f}  perplexity {result.perplexity:.2f}")

    def _is_saved(self) -> bool:
        path = self.run_directory / "checkpoints" / checkpoint_name(self.step)
        return self.checkpoint is not None and self.checkpoint.resolve() == path.resolve()

    def _save(self) -> None:
        tensors, python_rng = rng_state()
        state = TrainingState(
            step=self.step,
            meter=self.meter.state_dict(),
            loader=gather_object([self.train_loader.state_dict()]),
            gate_monitor=self.monitor.state_dict(),
            tensors=optimizer_tensors(self.optimizer) | tensors,
            python_rng=python_rng,
        )
        if not self.accelerator.is_main_process:
            return
        directory = self.run_directory / "checkpoints"
        limit = self.settings.training.save_total_limit
        self.checkpoint = save_checkpoint(directory, self.unwrapped, self.tokenizer, state, limit)
        if self.settings.gate_monitor.enabled and self.settings.gate_monitor.export_plan:
            self.monitor.plan(source=str(self.run_directory)).save(self.run_directory / "prune_plan.json")

    def _announce(self) -> None:
        parameters = sum(p.numel() for p in self.unwrapped.parameters())
        t = self.settings.training
        rows = t.batch_size * t.gradient_accumulation_steps * self.accelerator.num_processes
        origin = f"resumed from {self.checkpoint}" if self.checkpoint else "new run"
        self.view.message(
            f"{self.run_directory}: {origin}, {parameters:,} parameters, {rows * t.max_seq_length:,} tokens a step, "
            f"{self.accelerator.device.type}, {'bf16 autocast' if t.mixed_precision == 'bf16' else 'float32'}"
        )
        if self.lengths.varies:
            self.view.message(f"length curriculum: rows of {self.lengths}")
        if self.eval_loader is None:
            reason = "data.eval_paths is empty" if t.eval_interval else "training.eval_interval is 0"
            self.view.message(f"no evaluation: {reason}")

    def _report_end(self, stop: StopRequest) -> None:
        for name, loader in (("data", self.train_loader), ("evaluation data", self.eval_loader)):
            if loader is not None and (report := loader.report()).skipped:
                self.view.warn(f"{name}: {report.summary()}")
        if stop.signal is None:
            self.view.message(f"done: {self.step} steps, checkpoint {self.checkpoint}")
            return
        saved = f"saved {self.checkpoint}" if self.checkpoint else "nothing to save yet"
        self.view.message(
            f"{stop.signal.name}: stopped after step {self.step}, {saved}; go on with: "
            f"fusiontree train --config {shlex.quote(str(self.run_directory / 'config.yaml'))} --resume auto"
        )
