"""The training loop, the only one: every engine of `train/parallel.py` runs through it."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from fusiontree.artifacts import RunManifest, checkpoint_name, make_directory
from fusiontree.config import dump_yaml
from fusiontree.data.batch import Batch
from fusiontree.data.loader import Loader, build_loader
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.train.checkpoint import (
    TrainingState,
    load_model,
    load_moments,
    load_state,
    save_checkpoint,
    saved_fingerprint,
)
from fusiontree.train.checkpoint_files import BEST, point, remove_unfinished
from fusiontree.train.diagnosis import first_not_finite
from fusiontree.train.evaluation import TokenLoss, evaluate_loader
from fusiontree.train.guards import StepGuard
from fusiontree.train.launch import close_accelerator, open_accelerator
from fusiontree.train.loggers import JsonlLog, ProgressView
from fusiontree.train.losses import TERMS, HybridModelLoss, StepTotals, coefficients_at
from fusiontree.train.meter import StepMeter
from fusiontree.train.monitor_gate import GateMonitor, mean_gate
from fusiontree.train.optim import learning_rate_at
from fusiontree.train.parallel import open_parallel
from fusiontree.train.processes import Processes
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import (
    checkpoint_to_resume,
    enable_gradient_checkpointing,
    initial_weights,
    model_config,
    require_steps_left,
    seed_model,
    seed_step,
    tokenizer_of,
)
from fusiontree.train.stop import StopRequest
from fusiontree.train.teacher import Teacher, load_teacher
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
    """One run, from settings to its last checkpoint; every process of it makes one.

    Everything that can be wrong with the settings, the data or a checkpoint is found here, before the first step.

    Args:
        settings: the whole run.
        resume: None = a new run; "auto" = the run's newest checkpoint that is whole, if any; or the path of a
            checkpoint or run.

    Raises:
        InputError: anything that cannot be used, in one sentence.
    """

    def __init__(self, settings: RunSettings, resume: str | None = None):
        self.settings = settings
        self.run_directory = Path(settings.output_dir)
        check_trackers(settings.logging)
        self.accelerator = open_accelerator(settings)
        try:
            self._open(resume)
        except BaseException:
            close_accelerator()
            raise

    def _open(self, resume: str | None) -> None:
        settings = self.settings
        self.processes = Processes(self.accelerator)
        self.lengths = settings.length_schedule(self.processes.count)
        self.passed_over: list[str] = []
        self.checkpoint = self.processes.on_main(
            lambda: checkpoint_to_resume(self.run_directory, resume, self.passed_over.append)
        )
        state, model, teacher = self.processes.on_all(self._load)
        throughput = Throughput(model, self.processes.device, settings)  # counts the whole model: before it is sharded
        self.parallel = open_parallel(self.accelerator, model, settings)
        self.loss = HybridModelLoss(settings.loss, teacher)
        self.monitor = GateMonitor(settings.gate_monitor, model.config.num_layers, model.config.layer_branches)
        self.meter = StepMeter(throughput)
        self.guard = StepGuard(settings.training)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.evaluated_step: int | None = None
        self.evaluation: TokenLoss | None = None
        self.metrics = MetricsLog(self.run_directory)
        self.gates = JsonlLog(self.run_directory / "gates.jsonl")
        if state is not None:
            self.processes.on_all(lambda: self._restore(state))
        self.evaluated_step = self.processes.on_main(self._open_run_directory)

    def _load(self) -> tuple[TrainingState | None, HybridLanguageModel, Teacher | None]:
        """What comes from files: the place to resume from, the data, the model and its teacher."""
        settings, checkpoint = self.settings, self.checkpoint
        state = load_state(checkpoint) if checkpoint else None
        if checkpoint and state:
            require_steps_left(settings, checkpoint, state.step)
        self.tokenizer = tokenizer_of(settings)
        config = model_config(settings, self.tokenizer)
        self.train_loader = self._loader("train")
        self.eval_loader = self._loader("eval") if self._evaluates else None
        seed_model(settings.seed)
        start = checkpoint or initial_weights(settings)
        model = load_model(start, config) if start else HybridLanguageModel(config)
        enable_gradient_checkpointing(model, settings.training.checkpointing_scope)
        model.to(self.accelerator.device)
        teacher = None
        if settings.loss.teacher is not None:
            teacher = load_teacher(settings.loss.teacher, self.tokenizer, config.vocab_size, self.accelerator.device)
            if settings.loss.hidden_coeff:
                teacher.require_layers_of(config)
        return state, model, teacher

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
            rank=self.processes.index,
            world_size=self.processes.count,
        )

    def _restore(self, state: TrainingState) -> None:
        self.train_loader.load_state_dict(state.loader)
        self.guard.load_state_dict(state.guard)
        self.best = state.best
        self._restore_training(state)

    def _restore_training(self, state: TrainingState) -> None:
        """All but the place in the data, and what has been seen on the way."""
        assert self.checkpoint is not None
        self.monitor.load_state_dict(state.gate_monitor)
        self.meter.load_state_dict(state.meter)
        self.step = state.step
        self.parallel.restore_moments(load_moments(self.checkpoint))

    def _open_run_directory(self) -> int | None:
        """Make the directory, or drop from its logs what a resumed run is about to write again.

        Returns:
            The last step that the log has an evaluation of: a stop may have cut short that of the step it saved.
        """
        make_directory(self.run_directory, "output_dir")
        remove_unfinished(self.run_directory / "checkpoints")
        evaluated = self._truncate_logs(self.step if self.checkpoint else -1)
        resolved = self.settings.model_dump(mode="json")
        # Every field, so that the file trains the same run again when a default has changed.
        config = self.parallel.module.config
        resolved["model"] = {name: getattr(config, name) for name in type(config).__annotations__}
        dump_yaml(resolved, self.run_directory / "config.yaml")
        manifest = self.run_directory / "manifest.json"
        if self.checkpoint is None or not manifest.exists():
            RunManifest.collect(
                resolved,
                data_fingerprint=self.train_loader.fingerprint(),
                parent_run=str(self.checkpoint) if self.checkpoint else self.settings.training.init_from,
            ).save(manifest)
        self.metrics.open_trackers(self.settings.logging, resolved)
        return evaluated

    def _truncate_logs(self, step: int) -> int | None:
        self.metrics.close()
        self.gates.close()
        rows = self.metrics.truncate_after(step)
        self.gates.truncate_after(step)
        return max((row["step"] for row in rows if "eval_loss" in row), default=None)

    def run(self) -> TrainResult:
        """Train until `max_steps`, or until SIGINT, SIGTERM or SIGUSR1 asks to stop; either way the last step is saved.

        Raises:
            InputError: losses or gradients that stay without a finite value, a full disk, data that changed underneath,
                a process of the run that was lost.
        """
        self.parallel.model.train()
        t = self.settings.training
        self.view = ProgressView(self.settings.logging.progress, t.max_steps, self.step, visible=self.processes.is_main)
        try:
            with StopRequest() as stop:
                self._announce()
                self._evaluate_if_due(stop)
                batches = iter(self.train_loader)
                stopping = self.processes.any(bool(stop))
                while self.step < t.max_steps and not stopping:
                    before = self.step
                    stopping = self._train_step(batches, stop)
                    if self.step <= before:
                        continue  # it went back to a checkpoint
                    if self.step % t.log_interval == 0 or self.step == t.max_steps:
                        self._log()
                    self._evaluate_if_due(stop)
                    if t.save_interval and self.step % t.save_interval == 0:
                        self._save_on_the_way()
                    # Several processes agree in their next step; one alone need not wait for it.
                    stopping = stopping or (self.processes.count == 1 and bool(stop))
                if self.step > 0 and not self._is_saved():
                    self._save()
                signal = self.processes.first(stop.signal)
                self._report_end(signal)
                return TrainResult(self.run_directory, self.step, self.checkpoint, self.evaluation, signal)
        except RuntimeError as error:
            lost = self.processes.lost(error)
            if lost is None:
                raise
            raise lost from error
        finally:
            self.view.close()
            self.metrics.close()
            self.gates.close()
            close_accelerator()

    def _train_step(self, batches: Iterator[Batch], stop: StopRequest) -> bool:
        """One optimizer step. All its micro-batches are fetched first: each is weighted by its part of the whole.

        Returns:
            Whether any process was asked to stop.
        """
        t, step = self.settings.training, self.step + 1
        started = time.perf_counter()
        self.processes.post(step)
        stage = self.lengths.at(step)
        self.train_loader.set_shape(stage.batch_size, stage.length)
        micro_batches, totals = self._fetch(batches)
        self.meter.count_operations(micro_batches)
        with_details = self.monitor.due(step)
        sums = self._forward_backward(step, micro_batches, totals, with_details)
        learning_rate = learning_rate_at(step, t)
        grad_norm = self.parallel.update(learning_rate)
        asked = torch.tensor([float(bool(stop))], device=sums.device)
        *values, stopping = self.processes.sum(torch.cat((sums, asked))).tolist()
        values.append(grad_norm)
        self.step = step
        seconds = time.perf_counter() - started
        if all(map(math.isfinite, values)):
            self._finish_step(values, totals, seconds, with_details)
        else:
            self.meter.add_skipped(totals, seconds)
            self.monitor.forget()
            self._leave_out(values, micro_batches, totals)
        return stopping > 0

    def _fetch(self, batches: Iterator[Batch]) -> tuple[list[Batch], StepTotals]:
        """The next micro-batches of this process, and what all processes' hold together."""
        failure, micro_batches = None, []
        try:
            micro_batches = [next(batches) for _ in range(self.settings.training.gradient_accumulation_steps)]
            counts = StepTotals.local(micro_batches)
        except InputError as error:
            failure, counts = error, torch.zeros(3, dtype=torch.float64)
        failed = torch.tensor([float(failure is not None)], dtype=torch.float64)
        *_, failures = counts = self.processes.sum(torch.cat((counts, failed)))
        if failures:
            self.processes.on_all(lambda: _raise(failure))
        return micro_batches, StepTotals.of(counts[:3])

    def _finish_step(self, values: list[float], totals: StepTotals, seconds: float, with_details: bool) -> None:
        rate = learning_rate_at(self.step, self.settings.training)
        self.meter.add(values, totals, rate, seconds, self.loss.coefficients)
        if with_details:
            self._record_gates(int(totals.tokens))
        loss = self.meter.newest["loss"] or 0.0
        if spike := self.guard.finished(loss):
            far = f"{spike:.1f} standard deviations above the mean of the last ones"
            self.view.warn(f"step {self.step}: loss {loss:.4f} is a spike, {far}")
        self.view.step(self.step, self.meter.newest | self._length())

    def _forward_backward(
        self, step: int, micro_batches: list[Batch], totals: StepTotals, with_details: bool
    ) -> torch.Tensor:
        """Add up the gradients of a step; returns this process's loss terms, gate sum and gate weight."""
        seed_step(self.settings.seed, step, self.processes.index)
        self.loss.coefficients = coefficients_at(step, self.settings.training.max_steps, self.settings.loss)
        sums = torch.zeros(len(TERMS) + 2, device=self.processes.device)
        for index, micro_batch in enumerate(micro_batches):
            batch = micro_batch.to(self.processes.device, non_blocking=True)
            self.parallel.module.set_dropout_key(self.settings.seed, step, index)
            with self.parallel.accumulate(is_last=index == len(micro_batches) - 1):
                with self._autocast():
                    output = self.parallel.model(
                        input_ids=batch.input_ids,
                        position_ids=batch.position_ids,
                        labels=batch.labels,
                        output_gates=with_details,
                        output_hidden_states=self.loss.needs_hidden_states,
                    )
                    share = self.loss(output, batch, totals, self.parallel.module.lm_head.weight)
                self.parallel.backward(share.total)
            self.parallel.average_running_means()
            sums += torch.cat((share.terms, share.gates))
            if output.gate_stats.details is not None:
                self.monitor.update(output.gate_stats.details)
            del output, share
        return sums

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.processes.device.type,
            dtype=torch.bfloat16,
            enabled=self.settings.training.mixed_precision == "bf16",
        )

    def _leave_out(self, values: list[float], micro_batches: list[Batch], totals: StepTotals) -> None:
        """A step was not finite and changed no weight: go on, go back once, or stop and say where it comes from."""
        names = (*TERMS, "gate sum", "gate weight", "gradient norm")
        wrong = [f"{name} {value}" for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        problem = f"step {self.step} is not finite ({', '.join(wrong)})"
        verdict = self.guard.left_out()
        if verdict == "go on":
            self.view.warn(f"{problem}: left out, {self.guard.in_a_row} in a row")
            return
        if verdict == "roll back" and self.checkpoint is not None:
            self.view.warn(
                f"{problem}, {self.settings.training.max_skipped_steps} were before it: back to {self.checkpoint}"
            )
            self._go_back()
            return
        where = first_not_finite(
            self.parallel, lambda: self._forward_backward(self.step, micro_batches, totals, with_details=False)
        )
        last = self.checkpoint or "none yet"
        where = self.processes.first(where)
        raise InputError(
            f"{problem}{f', first in {where}' if where else ''}, training stopped before its update; last checkpoint: "
            f"{last}; lower training.learning_rate or lengthen training.warmup_steps"
        )

    def _go_back(self) -> None:
        """To weights, moments and counters of the last checkpoint, but not to the text that led here."""
        checkpoint = self.checkpoint
        assert checkpoint is not None
        self.parallel.restore_weights(load_model(checkpoint).state_dict())
        self._restore_training(load_state(checkpoint))
        self.evaluated_step = self.processes.on_main(lambda: self._truncate_logs(self.step))
        self.parallel.model.train()

    def _record_gates(self, tokens: int) -> None:
        statistics = self.monitor.record(self.step, tokens, self.meter.tokens, self.processes.sum)
        self.meter.gate_std = (mean_gate(statistics) or (None, None))[1]
        if self.processes.is_main:
            self._write(self.gates, statistics.dumps())

    def _log(self) -> None:
        row = self.meter.close_row(self.step) | self._length() | {"skipped_steps": self.guard.skipped}
        if self.settings.loss.commit_from is not None:
            row |= {f"{name}_coeff": self.loss.coefficients[name] for name in ("load_balance", "entropy")}
        if self.processes.is_main:
            self._write(self.metrics, row)
        remaining = self.settings.training.max_steps - self.step
        self.view.row(row, remaining * self.meter.seconds_per_step)

    def _write(self, log: JsonlLog, row: Any) -> None:
        """A log that cannot be written costs its rows, not the run."""
        try:
            log.write(row)
        except InputError as error:
            self.view.warn(f"{error}")

    def _length(self) -> dict[str, Any]:
        """The last step's tokens in a row, to show beside its other numbers; nothing where all rows are alike."""
        return {"length": self.train_loader.length} if self.lengths.varies else {}

    def _evaluate_if_due(self, stop: StopRequest) -> None:
        """At step 0, at every interval and at the end; also where a stop cut an evaluation short before resuming."""
        t = self.settings.training
        due = self.step % max(1, t.eval_interval) == 0 or self.step == t.max_steps
        if self.eval_loader is None or not due or self.evaluated_step == self.step:
            return
        result = self.evaluate(self.parallel.model, stop=lambda: self.processes.any(bool(stop)))
        if result is None:
            return
        self.evaluation, self.evaluated_step = result, self.step
        row = {"eval_loss": result.loss, "eval_perplexity": result.perplexity, "eval_tokens": result.tokens}
        if self.processes.is_main:
            self._write(self.metrics, {"step": self.step, **row})
        self.view.message(f"step {self.step}  eval loss {result.loss:.4f}  perplexity {result.perplexity:.2f}")
        if t.save_best and self.step > 0 and (self.best is None or result.loss < self.best["loss"]):
            self.best = {"step": self.step, "loss": result.loss}
            self._save_on_the_way()

    def evaluate(self, model: torch.nn.Module, stop: Callable[[], bool] = lambda: False) -> TokenLoss | None:
        """Loss of a model, the run's own or another, on the run's evaluation data; None when `stop` gave up."""
        assert self.eval_loader is not None
        with self._autocast():
            return evaluate_loader(
                model,
                self.eval_loader,
                self.settings.training.eval_batches,
                device=self.processes.device,
                reduce=self.processes.sum,
                stop=stop,
            )

    def _is_saved(self) -> bool:
        path = self.run_directory / "checkpoints" / checkpoint_name(self.step)
        return self.checkpoint is not None and self.checkpoint.resolve() == path.resolve()

    def _save_on_the_way(self) -> None:
        """A checkpoint that cannot be saved costs no more than itself: the next one may."""
        if self._is_saved():
            return
        try:
            self._save()
        except InputError as error:
            self.view.warn(f"{error}; training goes on")

    def _save(self) -> None:
        state = TrainingState(
            step=self.step,
            meter=self.meter.state_dict(),
            loader=self.train_loader.state_dict(),
            gate_monitor=self.monitor.state_dict(),
            guard=self.guard.state_dict(),
            best=self.best,
        )
        limit = self.settings.training.save_total_limit
        path = save_checkpoint(self.run_directory, self.parallel, self.processes, self.tokenizer, state, limit)
        self.checkpoint = path
        if not self.processes.is_main:
            return
        if self.best is not None and self.best["step"] == self.step:
            point(self.run_directory / BEST, path)
        if self.settings.gate_monitor.enabled and self.settings.gate_monitor.export_plan:
            model = saved_fingerprint(path, self.parallel.module)
            self.monitor.plan(str(self.run_directory), model).save(self.run_directory / "prune_plan.json")

    def _announce(self) -> None:
        t = self.settings.training
        rows = t.batch_size * t.gradient_accumulation_steps * self.processes.count
        origin = f"resumed from {self.checkpoint}" if self.checkpoint else "new run"
        self.view.message(
            f"{self.run_directory}: {origin}, {self.parallel.num_parameters:,} parameters, "
            f"{rows * t.max_seq_length:,} tokens a step, {self._engine()}, "
            f"{'bf16 autocast' if t.mixed_precision == 'bf16' else 'float32'}"
        )
        for sentence in self.passed_over:
            self.view.warn(sentence)
        if self.lengths.varies:
            self.view.message(f"length curriculum: rows of {self.lengths}")
        if self.eval_loader is None:
            reason = "data.eval_paths is empty" if t.eval_interval else "training.eval_interval is 0"
            self.view.message(f"no evaluation: {reason}")

    def _engine(self) -> str:
        device, count = self.processes.device.type, self.processes.count
        if not self.settings.system.is_sharded:
            return device if count == 1 else f"DDP on {count} x {device}"
        return f"{self.settings.system.engine} on {count} x {device}"

    def _report_end(self, signal: Signals | None) -> None:
        for name, loader in (("data", self.train_loader), ("evaluation data", self.eval_loader)):
            if loader is not None and (report := loader.report()).skipped:
                self.view.warn(f"{name}: {report.summary()}")
        if signal is None:
            self.view.message(f"done: {self.step} steps, checkpoint {self.checkpoint}")
            return
        saved = f"saved {self.checkpoint}" if self.checkpoint else "nothing to save yet"
        self.view.message(
            f"{signal.name}: stopped after step {self.step}, {saved}; go on with: "
            f"fusiontree train --config {shlex.quote(str(self.run_directory / 'config.yaml'))} --resume auto"
        )


def _raise(error: InputError | None) -> None:
    if error is not None:
        raise error
