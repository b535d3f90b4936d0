"""The training loop, the only one: every engine of `train/parallel.py` runs through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from fusiontree.artifacts import check_writable
from fusiontree.data.batch import Batch
from fusiontree.data.loader import Loader, build_loader
from fusiontree.errors import InputError
from fusiontree.models import HybridLanguageModel
from fusiontree.train.announce import announce_end, announce_start
from fusiontree.train.checkpoint import TrainingState, load_model, load_moments, load_state
from fusiontree.train.diagnosis import first_not_finite
from fusiontree.train.evaluation import TokenLoss
from fusiontree.train.guards import StepGuard
from fusiontree.train.launch import close_accelerator, open_accelerator, told_once
from fusiontree.train.loggers import ProgressView
from fusiontree.train.losses import TERMS, HybridModelLoss, StepTotals
from fusiontree.train.meter import StepMeter
from fusiontree.train.monitor_gate import GateMonitor, mean_gate
from fusiontree.train.optim import learning_rate_at, parameter_groups
from fusiontree.train.parallel import open_parallel
from fusiontree.train.processes import Processes
from fusiontree.train.run_evaluation import RunEvaluation
from fusiontree.train.run_files import RunFiles
from fusiontree.train.saving import RunSaver
from fusiontree.train.settings import RunSettings
from fusiontree.train.setup import (
    checkpoint_to_resume,
    common_facts,
    enable_gradient_checkpointing,
    initial_weights,
    model_config,
    require_steps_left,
    seed_model,
    tokenizer_of,
)
from fusiontree.train.step import StepGradients, fetch
from fusiontree.train.stop import StopRequest
from fusiontree.train.teacher import Teacher, check_vocabulary, load_teacher
from fusiontree.train.throughput import Throughput
from fusiontree.train.trackers import check_trackers


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
        with told_once():
            check_trackers(settings.logging)
            for directory in (self.run_directory, self.run_directory / "checkpoints"):
                check_writable(directory, "output_dir")
        self.accelerator = open_accelerator(settings)
        self.processes = Processes(self.accelerator, settings.system.timeout)
        try:
            with self.processes.naming_the_lost():
                self._open(resume)
        except BaseException:
            self.processes.close()
            close_accelerator()
            raise

    def _open(self, resume: str | None) -> None:
        settings = self.settings
        self.processes.require_equal(common_facts(settings), "start all processes with the same settings and launcher")
        self.lengths = settings.length_schedule(self.processes.count)
        self.passed_over: list[str] = []
        checkpoint = self.processes.on_main(
            lambda: checkpoint_to_resume(self.run_directory, resume, self.passed_over.append)
        )
        state, model, teacher = self.processes.on_all(lambda: self._load(checkpoint))
        loaders = {"training": self.train_loader, "evaluation": self.evaluation.loader}
        self.processes.require_equal(
            {
                f"the fingerprint of the {name} data": loader and loader.fingerprint()
                for name, loader in loaders.items()
            },
            "give all processes the same files, with the same times of change, and the same tokenizer",
        )
        # Of the whole model: before it is sharded.
        self.groups = parameter_groups(model, settings.training)
        throughput = Throughput(model, self.processes.device, settings)
        self.parallel = open_parallel(self.accelerator, model, settings)
        self.loss = HybridModelLoss(settings.loss, teacher)
        self.monitor = GateMonitor(settings.gate_monitor, model.config.num_layers, model.config.layer_branches)
        self.gradients = StepGradients(
            settings, self.processes, parallel=self.parallel, loss=self.loss, monitor=self.monitor
        )
        self.meter = StepMeter(throughput)
        self.guard = StepGuard(settings.training)
        self.step = 0
        self.view = ProgressView("none", settings.training.max_steps, 0, visible=False)
        self.files = RunFiles(settings)
        self.saver = RunSaver(
            settings,
            checkpoint,
            best=state.best if state is not None else None,
            parallel=self.parallel,
            processes=self.processes,
            tokenizer=self.tokenizer,
            monitor=self.monitor,
            state=self._state,
        )
        if state is not None:
            self.processes.on_all(lambda: self._restore(state))
        config, fingerprint = self.parallel.module.config, self.train_loader.fingerprint
        self.evaluation.step = self.processes.on_main(
            lambda: self.files.open(config, step=self.step, checkpoint=checkpoint, fingerprint=fingerprint)
        )

    def _load(self, checkpoint: Path | None) -> tuple[TrainingState | None, HybridLanguageModel, Teacher | None]:
        """What comes from files: the place to resume from, the data, the model and its teacher."""
        settings = self.settings
        state = load_state(checkpoint) if checkpoint else None
        if checkpoint and state:
            require_steps_left(settings, checkpoint, state.step)
        self.tokenizer = tokenizer_of(settings)
        config = model_config(settings, self.tokenizer)
        if settings.loss.teacher is not None:
            check_vocabulary(settings.loss.teacher, self.tokenizer, config.vocab_size)
        self.train_loader = self._loader("train")
        self.evaluation = RunEvaluation(settings, self._loader("eval") if settings.evaluates else None, self.processes)
        seed_model(settings.seed)
        start = checkpoint or initial_weights(settings)
        model = load_model(start, config) if start else HybridLanguageModel(config)
        enable_gradient_checkpointing(model, settings.training.checkpointing_scope)
        model.to(self.accelerator.device)
        teacher = None
        if settings.loss.teacher is not None:
            teacher = load_teacher(settings.loss.teacher, self.tokenizer, self.accelerator.device)
            if settings.loss.hidden_coeff:
                teacher.require_layers_of(config)
        return state, model, teacher

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
        self.evaluation.best = state.best
        self._restore_training(state)

    def _restore_training(self, state: TrainingState) -> None:
        """All but the place in the data, and what has been seen on the way."""
        assert self.saver.newest is not None
        self.monitor.load_state_dict(state.gate_monitor)
        self.meter.load_state_dict(state.meter)
        self.step = state.step
        self.parallel.restore_moments(load_moments(self.saver.newest))

    def run(
        self, draw: Callable[[Path], Sequence[Path]] | None = None, *, go_on_with: str | None = None
    ) -> TrainResult:
        """Train until `max_steps`, or until SIGINT, SIGTERM or SIGUSR1 asks to stop; either way the last step is saved.

        Args:
            draw: makes pictures of the run from its directory when it has ended, in the main process alone; the
                trackers are handed the PNG files that it returns.
            go_on_with: the command to name when the run is stopped; None: `fusiontree train`.

        Raises:
            InputError: losses or gradients that stay without a finite value, a full disk, data that changed underneath,
                a process of the run that was lost.
        """
        try:
            with self.processes.naming_the_lost(), StopRequest() as stop:
                for _ in self.steps(stop):
                    pass
                if self.step > 0:
                    self.saver.save(self.view.warn)
                signal = self.processes.first(stop.signal)
                loaders = {"data": self.train_loader, "evaluation data": self.evaluation.loader}
                announce_end(
                    self.view,
                    self.run_directory,
                    self.step,
                    checkpoint=self.saver.newest,
                    signal=signal,
                    loaders=loaders,
                    go_on_with=go_on_with,
                )
                if draw is not None and self.step > 0 and self.processes.is_main:
                    self.files.metrics.show(draw(self.run_directory), self.step)
                return TrainResult(self.run_directory, self.step, self.saver.newest, self.evaluation.result, signal)
        finally:
            self.close()

    def steps(self, stop: StopRequest) -> Iterator[int]:
        """The loop of `run`: yields the number of each step when all that belongs to it is done.

        Rows of the logs, evaluation and checkpoints on the way belong to it; the last checkpoint does not, nor `close`.
        """
        t = self.settings.training
        self.parallel.model.train()
        self.view = ProgressView(self.settings.logging.progress, t.max_steps, self.step, visible=self.processes.is_main)
        announce_start(
            self.view,
            self.settings,
            self.processes,
            groups=self.groups,
            num_parameters=self.parallel.num_parameters,
            lengths=self.lengths,
            checkpoint=self.saver.newest,
            passed_over=self.passed_over,
            evaluates=self.evaluation.loader is not None,
        )
        was_cut = self._evaluate_if_due(stop)
        batches = iter(self.train_loader)
        stopping = was_cut or self.processes.any(bool(stop))
        while self.step < t.max_steps and not stopping:
            before = self.step
            stopping = self._train_step(batches, stop)
            if self.step <= before:
                continue  # it went back to a checkpoint
            if self.step % t.log_interval == 0 or self.step == t.max_steps:
                self._log()
            was_cut = self._evaluate_if_due(stop)
            if t.save_interval and self.step % t.save_interval == 0:
                self.saver.save_on_the_way(self.view.warn)
            yield self.step
            # Several processes agree in their next step, which a cut evaluation forbids: only where the run ends is it
            # made up for. One process alone need not wait either.
            stopping = stopping or was_cut or (self.processes.count == 1 and bool(stop))

    def close(self) -> None:
        """Close logs and display; the group of processes stays."""
        self.processes.close()
        self.view.close()
        self.files.close()
        close_accelerator()

    def _train_step(self, batches: Iterator[Batch], stop: StopRequest) -> bool:
        """One optimizer step. All its micro-batches are fetched first: each is weighted by its part of the whole.

        Returns:
            Whether any process was asked to stop.
        """
        t, step = self.settings.training, self.step + 1
        started = time.perf_counter()
        self.processes.enter("reading data", step)
        stage = self.lengths.at(step)
        self.train_loader.set_shape(stage.batch_size, stage.length)
        micro_batches, totals = fetch(batches, t.gradient_accumulation_steps, self.processes)
        self.meter.count_operations(micro_batches)
        with_details = self.monitor.due(step)
        sums = self.gradients(step, micro_batches, totals, with_details=with_details)
        learning_rate = learning_rate_at(step, t)
        self.processes.enter("optimizer", step)
        grad_norm = self.parallel.update(learning_rate)
        asked = torch.tensor([float(bool(stop))], device=sums.device)
        *values, stopping = self.processes.sum(torch.cat((sums, asked))).tolist()
        values.append(grad_norm)
        self.processes.enter("writing logs", step)
        self.step = step
        seconds = time.perf_counter() - started
        if all(map(math.isfinite, values)):
            self._finish_step(values, totals, seconds, with_details)
        else:
            self.meter.add_skipped(totals, seconds)
            self.monitor.forget()
            self._leave_out(values, micro_batches, totals)
        return stopping > 0

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

    def _leave_out(self, values: list[float], micro_batches: list[Batch], totals: StepTotals) -> None:
        """A step was not finite and changed no weight: go on, go back once, or stop and say where it comes from."""
        names = (*TERMS, "gate sum", "gate weight", "gradient norm")
        wrong = [f"{name} {value}" for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        problem = f"step {self.step} is not finite ({', '.join(wrong)})"
        verdict = self.guard.left_out()
        if verdict == "go on":
            self.view.warn(f"{problem}: left out, {self.guard.in_a_row} in a row")
            return
        if verdict == "roll back" and self.saver.newest is not None:
            self.view.warn(
                f"{problem}, {self.settings.training.max_skipped_steps} were before it: back to {self.saver.newest}"
            )
            self._go_back()
            return
        where = first_not_finite(
            self.parallel, lambda: self.gradients(self.step, micro_batches, totals, with_details=False)
        )
        last = self.saver.newest or "none yet"
        where = self.processes.first(where)
        raise InputError(
            f"{problem}{f', first in {where}' if where else ''}, training stopped before its update; last checkpoint: "
            f"{last}; lower training.learning_rate or lengthen training.warmup_steps"
        )

    def _go_back(self) -> None:
        """To weights, moments and counters of the last checkpoint, but not to the text that led here."""
        checkpoint = self.saver.newest
        assert checkpoint is not None
        self.parallel.restore_weights(load_model(checkpoint).state_dict())
        self._restore_training(load_state(checkpoint))
        self.evaluation.step = self.processes.on_main(lambda: self.files.truncate(self.step))
        self.parallel.model.train()

    def _record_gates(self, tokens: int) -> None:
        statistics = self.monitor.record(self.step, tokens, self.meter.tokens, self.processes.sum)
        self.meter.gate_std = (mean_gate(statistics) or (None, None))[1]
        if self.processes.is_main:
            self.files.write(self.files.gates, statistics.dumps(), self.view.warn)

    def _log(self) -> None:
        row = self.meter.close_row(self.step) | self._length()
        row |= {"skipped_steps": self.guard.skipped, "spikes": self.guard.spikes}
        if self.settings.loss.commit_from is not None:
            row |= {f"{name}_coeff": self.loss.coefficients[name] for name in ("load_balance", "entropy")}
        if self.processes.is_main:
            self.files.write(self.files.metrics, row, self.view.warn)
        remaining = self.settings.training.max_steps - self.step
        self.view.row(row, remaining * self.meter.seconds_per_step)

    def _length(self) -> dict[str, Any]:
        """The last step's tokens in a row, to show beside its other numbers; nothing where all rows are alike."""
        return {"length": self.train_loader.length} if self.lengths.varies else {}

    def _evaluate_if_due(self, stop: StopRequest) -> bool:
        """Returns: whether a stop, asked for in any process, cut it short in all of them."""
        if not self.evaluation.is_due(self.step):
            return False
        row = self.evaluation.at(self.step, self.parallel.model, lambda: bool(stop))
        if row is None:
            return True
        if self.processes.is_main:
            self.files.write(self.files.metrics, row, self.view.warn)
        self.view.message(
            f"step {self.step}  eval loss {row['eval_loss']:.4f}  perplexity {row['eval_perplexity']:.2f}"
        )
        if self.evaluation.is_best():
            self.saver.save_on_the_way(self.view.warn)
        return False

    def _state(self) -> TrainingState:
        return TrainingState(
            step=self.step,
            meter=self.meter.state_dict(),
            loader=self.train_loader.state_dict(),
            gate_monitor=self.monitor.state_dict(),
            guard=self.guard.state_dict(),
            best=self.evaluation.best,
        )
