"""Pruning measured end to end: criteria at equal saving, the frontier of speed and loss, healing against its rivals.

    python benchmarks/pruning.py                          # everything that is not recorded yet: many hours on two cores
    python benchmarks/pruning.py --stages parent criteria
    python benchmarks/pruning.py --report

A parent is trained on WikiText-2, cut into sections of which many carry facts, lists and sequences to find again, and
on the beginnings of those sections, where what is asked for stands near. Plans are made on the validation file;
everything is judged on the test file. Trained models stay in `--work`, and each finished figure is one line of
`benchmarks/results/pruning_SIZE.jsonl`; what is there is skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import records
import torch
from pruning_inputs import SIZES, most_layers_within, nearest_in_layers, write_sections
from pruning_recall import ROWS, TASK, TEXT_ROWS, mqar, teach
from pruning_report import report
from training_run import Recipe

import fusiontree
from fusiontree.artifacts import LayerDecision, PrunePlan
from fusiontree.data import train_bpe
from fusiontree.deploy import export
from fusiontree.deploy.budget import CostModel, ImpossibleBudgetError
from fusiontree.deploy.calibration import Calibration, calibration_text
from fusiontree.deploy.costs import Cost, measure_costs
from fusiontree.deploy.heal import SHARE_OF_RATE, SHARE_OF_STEPS, heal, heal_settings
from fusiontree.deploy.loading import find_model
from fusiontree.deploy.plan_settings import PlanSettings
from fusiontree.deploy.prune_plan import make_plan
from fusiontree.eval.peers import count_parameters
from fusiontree.eval.text_tasks import evaluate_tasks
from fusiontree.eval.texts import Texts
from fusiontree.models import HybridLanguageModel
from fusiontree.train.evaluation import evaluate_documents
from fusiontree.train.settings import RunSettings

SETTING = (
    "size",
    "steps",
    "batch_size",
    "length",
    "section",
    "beginning",
    "task_prob",
    "learning_rate",
    "context",
    "calibration_tokens",
    "dtype",
)
STAGES = ("parent", "criteria", "heal", "smaller", "difference", "frontier", "commit", "recall", "costs")
OUR_CODE = ("models", "ops", "train/losses.py", "deploy")
RANDOM_SEEDS = (0, 1, 2)
FREEZE_GATES = 0.002  # nats, all gates together: what the calibration text cannot tell from nothing
BUDGET = {"decode": 1.37, "memory": 0.78}
BLOCKS = 60  # of neighbouring documents of the test file, by which the uncertainty of a difference is judged
FRONTIER = (1.1, 1.2, 1.37, 1.5, 1.75, 2.0, 2.5)
PLAIN = ("smaller", "within-budget")
COMMIT = {"commit_from": 0.0, "commit_coeff": 0.3}  # of the steps that follow the parent's


class Rule(NamedTuple):
    """How a plan is made; a fine one takes single heads and gates too, and merges maps in the export.

    empty_layers: layers may lose both branches.
    """

    criterion: str
    seed: int = 0
    fine: bool = False
    empty_layers: bool = False

    @property
    def name(self) -> str:
        grain = ("-fine" if self.fine else "") + ("-empty" if self.empty_layers else "")
        return f"{self.criterion}-{self.seed}{grain}"


RANDOM = tuple(Rule("random", seed) for seed in RANDOM_SEEDS)
CRITERIA = tuple(Rule(criterion) for criterion in ("gate", "contribution", "ablation", "recall", "trained"))
RULES = (
    *CRITERIA,
    *RANDOM,
    *(Rule(criterion, fine=True) for criterion in ("ablation", "recall")),
    Rule("ablation", fine=True, empty_layers=True),
)


class Study:
    """One parent and everything that is measured around it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.work: Path = options.work
        # The first seed's records were made before others could be asked for.
        other = {"training_seed": options.seed} if options.seed else {}
        self.path: Path = options.results / f"pruning_{options.size}{f'_seed{options.seed}' if other else ''}.jsonl"
        # Of the code that is running, whatever becomes of the files meanwhile.
        self.revision, self.provenance = records.code_revision(*OUR_CODE), records.provenance()
        self.setting = {name: getattr(options, name) for name in SETTING} | other
        self._check_work()
        self._parent: HybridLanguageModel | None = None
        self._costs: CostModel | None = None

    def _check_work(self) -> None:
        """What lies in `--work` was made with the same settings."""
        file = self.work / "setting.json"
        if file.exists() and json.loads(file.read_text(encoding="utf-8")) != self.setting:
            raise SystemExit(f"error: {self.work} holds models of other settings ({file.name}): name another --work")
        self.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.setting), encoding="utf-8")

    # Text.

    def sections(self, name: str) -> Path:
        """A file of the corpus as sections of about `--section` characters."""
        file = self.work / f"{name}.jsonl"
        if not file.exists():
            write_sections(self.options.data / f"{name}.jsonl", file, self.options.section)
        return file

    def training_files(self) -> list[Path]:
        """The sections of the training text and, if asked for, what each begins with."""
        files = [self.sections("train")]
        if self.options.beginning:
            files.append(self.work / "beginnings.jsonl")
            if not files[1].exists():
                write_sections(files[0], files[1], self.options.beginning, shortened=True)
        return files

    def tokenizer(self) -> Path:
        folder = self.work / "tokenizer"
        if not folder.exists():
            train_bpe([str(self.sections("train"))], SIZES[self.options.size]["vocab_size"], str(folder))
        return folder

    # Models.

    def run_settings(self, name: str, steps: int, model: dict[str, Any], **changes: Any) -> RunSettings:
        options = self.options
        training = {
            "batch_size": options.batch_size,
            "max_seq_length": options.length,
            "max_steps": steps,
            "learning_rate": options.learning_rate,
            "warmup_steps": max(1, min(100, steps // 10)),
            "mixed_precision": "bf16" if options.dtype == "bf16" else "no",
            "eval_interval": max(1, steps // 4),
            "eval_batches": 20,
            "save_interval": max(1, steps // 4),
            "save_total_limit": 1,
        }
        sections: dict[str, Any] = {
            "model": {**model, "tie_word_embeddings": True},
            "data": {
                "train_sources": [{"paths": str(path)} for path in self.training_files()],
                "eval_paths": str(self.sections("valid")),
                "tokenizer": str(self.tokenizer()),
                "needle_in_haystack_prob": options.task_prob,
                "structured_task_prob": options.task_prob,
            },
            "training": training | changes.pop("training", {}),
            "gate_monitor": {"interval": max(1, steps // 20)},
            "logging": {"progress": "plain"},
            "system": {"num_threads": options.threads},
            "output_dir": str(self.work / name),
            "seed": self.options.seed,
            **changes,
        }
        return RunSettings.parse(sections)

    def trained(self, name: str, settings: Callable[[], RunSettings]) -> Path:
        """The checkpoint of a run, which is trained to its end if it is not there yet."""
        run = self.work / name
        if not (run / "done").exists():
            print(f"{name}: training", flush=True)
            result = fusiontree.train(settings(), resume="auto")
            if result.stopped_by is not None:
                raise SystemExit(f"error: {name} was stopped after step {result.step}")
            (run / "done").touch()
        return find_model(run)

    def parent_checkpoint(self) -> Path:
        size = SIZES[self.options.size]
        return self.trained("parent", lambda: self.run_settings("parent", self.options.steps, size))

    def load(self, folder: Path) -> HybridLanguageModel:
        torch.set_num_threads(self.options.threads)
        return fusiontree.load(folder, device="cpu")

    @property
    def parent(self) -> HybridLanguageModel:
        if self._parent is None:
            self._parent = self.load(self.parent_checkpoint())
        return self._parent

    def source(self, name: str) -> HybridLanguageModel:
        """A model to cut: the parent, or one of its size that a run left."""
        return self.parent if name == "parent" else self.load(find_model(self.work / name))

    @property
    def costs(self) -> CostModel:
        """One measurement for all plans: equal saving then means equal for every criterion."""
        if self._costs is None:
            file = self.work / "costs.json"
            if not file.exists():
                found = CostModel.measured(
                    self.parent, context=self.options.context, rounds=5, progress=_say, heads=True, gates=True
                )
                stored = {
                    "parent": asdict(found.parent),
                    "seconds": [[*key, *value] for key, value in found.seconds.items()],
                    "head_seconds": found.head_seconds,
                    "gate_seconds": found.gate_seconds,
                }
                file.write_text(json.dumps(stored), encoding="utf-8")
            stored = json.loads(file.read_text(encoding="utf-8"))
            seconds = {(kind, branch): (prefill, decode) for kind, branch, prefill, decode in stored["seconds"]}
            parent, model = Cost(**stored["parent"]), self.parent
            self._costs = CostModel(
                model.config,
                model.dtype,
                self.options.context,
                parent,
                seconds,
                {part: tuple(value) for part, value in stored["head_seconds"].items()},
                tuple(stored["gate_seconds"]),
            )
        return self._costs

    def plan(self, rule: Rule, targets: dict[str, float], source: str = "parent") -> PrunePlan:
        """A plan, of which the budget is met by the costs that its cuts add up to."""
        shown = "-".join(f"{key}{value:g}" for key, value in targets.items())
        file = self.work / "plans" / source / f"{rule.name}-{shown}.json"
        if not file.exists():
            documents = iter(Texts([str(self.sections("valid"))]))
            sizes = {"tokens": self.options.calibration_tokens, "length": self.options.length}
            model = self.source(source)
            text = calibration_text(model, documents, **sizes)
            settings = PlanSettings(
                criterion=rule.criterion,
                targets=targets,
                seed=rule.seed,
                empty_layers=rule.empty_layers,
                heads=rule.fine,
                freeze_gates=FREEZE_GATES if rule.fine else 0.0,
                context=self.options.context,
                is_verified=False,
            )
            plan = make_plan(model, text, settings, source=source, costs=self.costs, progress=_say)
            plan.save(file)
        return PrunePlan.load(file)

    def exported(self, rule: Rule, plan: PrunePlan, name: str, source: str = "parent") -> Path:
        folder = self.work / "exports" / name
        if not folder.exists():
            export(self.source(source), plan, folder, merge=rule.fine, parent=str(find_model(self.work / source)))
        return folder

    # Figures.

    def quality(self, folder: Path) -> dict[str, Any]:
        """Loss by position and recall on the test file."""
        model, texts = self.load(folder), Texts([str(self.sections("test"))])
        tasks = evaluate_tasks(model, texts, name=folder.name, max_tokens=self.options.report_tokens)
        found = {one.task: [round(one.right, 4), round(one.loss, 4)] for one in tasks.results}
        return {**self._loss(model), "recall": found}

    def _loss(self, model: HybridLanguageModel) -> dict[str, Any]:
        texts = Texts([str(self.sections("test"))])
        loss = evaluate_documents(model, model.tokenizer, texts, max_tokens=self.options.report_tokens)
        return {
            "parameters": count_parameters(model),
            "loss": round(loss.loss, 4),
            "by_position": [[part.start, round(part.loss, 4)] for part in loss.by_position],
        }

    def record(self, run: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
        run = run | self.setting
        records.check_revisions(self.path, self.revision, lambda r: True)
        if any(one["run"] == run for one in records.read_records(self.path)):
            print(f"{run}: recorded already", flush=True)
            return
        figures = measure()
        extra = {"revision": self.revision, "threads": self.options.threads, **self.provenance}
        shown = " ".join(records.shown_arguments(sys.argv[1:]))
        records.append_record(
            self.path, {"run": run, **figures, **extra, "command": f"python benchmarks/pruning.py {shown}"}
        )
        print(json.dumps({"run": run, **figures}), flush=True)

    # Stages.

    def stage_parent(self) -> None:
        self.record({"stage": "parent"}, lambda: self.quality(self.parent_checkpoint()) | self._evidence())

    def _evidence(self) -> dict[str, Any]:
        """What each branch costs alone, beside what its gate and its norm say of it."""
        plan = self.plan(Rule("ablation"), BUDGET)
        layers = [layer.evidence for layer in plan.layers]
        return {
            "gate_mean": [round(one["gate_mean"], 4) for one in layers],
            "rise": [[round(one[f"{name}_ablation"], 5) for name in ("mamba", "attention")] for one in layers],
            "contribution": [[round(one[f"{n}_contribution"], 4) for n in ("mamba", "attention")] for one in layers],
            "all_of_one": {name: round(self._without_all(name), 4) for name in ("mamba", "attention")},
        }

    def _without_all(self, branch: str) -> float:
        """The rise of the loss when every layer loses that branch."""
        documents = iter(Texts([str(self.sections("valid"))]))
        sizes = {"tokens": self.options.calibration_tokens, "length": self.options.length}
        calibration = Calibration(self.parent, calibration_text(self.parent, documents, **sizes))
        kept = "attention" if branch == "mamba" else "mamba"
        return calibration.cut([kept] * len(calibration.blocks)).loss - calibration.parent.loss

    def stage_criteria(self) -> None:
        for rule in RULES:
            self.record({"stage": "criteria", **rule._asdict()}, lambda rule=rule: self._cut(rule, BUDGET, rule.name))

    def stage_frontier(self) -> None:
        """By the chosen rule, which leaves every layer a branch, and by the same one without that condition."""
        for rule in (self.rule, self.rule._replace(empty_layers=True)):
            for decode in self.options.frontier:
                run = {"stage": "frontier", **rule._asdict(), "decode": decode}
                name = f"frontier-{rule.name}-{decode:g}"
                self.record(run, lambda rule=rule, decode=decode, name=name: self._reach(rule, decode, name))
                if self.options.heal_frontier and (self.work / "exports" / name).exists():
                    self.record(run | {"healed": True}, lambda name=name: self.quality(self._healed(name)))

    def _reach(self, rule: Rule, decode: float, name: str) -> dict[str, Any]:
        try:
            return self._cut(rule, {"decode": decode}, name)
        except ImpossibleBudgetError as error:
            return {"impossible": str(error)}

    def _cut(
        self,
        rule: Rule,
        targets: dict[str, float],
        name: str,
        source: str = "parent",
        judge: Callable[[Path], dict[str, Any]] | None = None,
    ) -> dict[str, Any]:
        plan = self.plan(rule, targets, source)
        return (judge or self.quality)(self.exported(rule, plan, name, source)) | _plan_figures(plan)

    def _healed(self, name: str) -> Path:
        """An export after healing."""
        run = self.work / f"healed-{name}"
        if not (run / "done").exists():
            settings = heal_settings(
                self.work / "exports" / name, parent=self.parent_checkpoint(), overrides=[f"output_dir={run}"]
            )
            if heal(settings, resume="auto").stopped_by is not None:
                raise SystemExit(f"error: {run.name} was stopped")
            (run / "done").touch()
        return find_model(run)

    @property
    def rule(self) -> Rule:
        """Of the frontier and of healing."""
        return Rule(self.options.criterion, fine=not self.options.coarse)

    @property
    def healing_steps(self) -> int:
        return max(1, round(SHARE_OF_STEPS * self.options.steps))

    def stage_heal(self) -> None:
        """At the main budget: the healed cut, the parent continued, the healed random cuts."""
        self._heal(self.rule)
        self.record({"stage": "heal", "model": "parent continued"}, lambda: self.quality(self._continued("continued")))
        for rule in RANDOM:
            self._heal(rule)

    def _continued(self, name: str, **changes: Any) -> Path:
        """The parent trained on for the steps of healing, on its schedule."""
        steps, size = self.healing_steps, SIZES[self.options.size]
        schedule = {
            "init_from": str(self.parent_checkpoint()),
            "learning_rate": SHARE_OF_RATE * self.options.learning_rate,
            "warmup_steps": round(SHARE_OF_STEPS * steps),
        }
        return self.trained(name, lambda: self.run_settings(name, steps, size, training=schedule, **changes))

    def _heal(self, rule: Rule) -> None:
        self.exported(rule, self.plan(rule, BUDGET), rule.name)
        run = {"stage": "heal", "model": "healed", **rule._asdict()}
        self.record(run, lambda: self.quality(self._healed(rule.name)))

    def _rivals(self) -> dict[str, dict[str, Any]]:
        """Sizes of plain models: as many parameters as the cut, the largest within its budget, and those asked for."""
        size = SIZES[self.options.size]
        export = self.exported(self.rule, self.plan(self.rule, BUDGET), self.rule.name)
        fitting = {
            "smaller": nearest_in_layers(size, count_parameters(self.load(export))),
            "within-budget": most_layers_within(size, BUDGET["memory"], self.options.context),
        }
        return {
            **{name: fitting[name] for name in self.options.plain},
            **{f"{layers}-layers": size | {"num_layers": layers} for layers in self.options.plain_layers},
        }

    def stage_smaller(self) -> None:
        """Plain models of fewer layers, trained for the tokens of parent and healing together."""
        steps = self.options.steps + self.healing_steps
        for name, rival in self._rivals().items():
            plain = self.trained(name, lambda name=name, rival=rival: self.run_settings(name, steps, rival))
            self.record({"stage": "heal", "model": f"plain {name}"}, lambda plain=plain: self.quality(plain))

    def stage_difference(self) -> None:
        """Every other finished model of the main budget against the healed cut, on the same text."""
        cut = None
        rivals = {"parent continued": "continued"} | {f"healed: {rule.name}": f"healed-{rule.name}" for rule in RANDOM}
        rivals |= {f"plain {name}": name for name in self._rivals()}
        for name, folder in rivals.items():
            if (self.work / folder / "done").exists():
                cut = cut or self._block_losses(self._healed(self.rule.name))
                self.record(
                    {"stage": "difference", "model": name},
                    lambda folder=folder, cut=cut: _difference(self._block_losses(find_model(self.work / folder)), cut),
                )

    def _block_losses(self, folder: Path) -> list[tuple[float, int]]:
        """Nats and tokens of each block of the test file."""
        model, documents = self.load(folder), list(Texts([str(self.sections("test"))]))
        ends = [round(len(documents) * (block + 1) / BLOCKS) for block in range(BLOCKS)]
        parts = (documents[start:end] for start, end in zip([0, *ends], ends, strict=False) if end > start)
        losses = [evaluate_documents(model, model.tokenizer, part) for part in parts]
        return [(one.loss * one.tokens, one.tokens) for one in losses]

    def stage_commit(self) -> None:
        """Gates that commit in the last steps beside gates that do not: the loss, and what equal cuts then cost."""
        for name, loss in (("continued", {}), ("committed", COMMIT)):
            run = {"stage": "commit", "model": name}
            self.record(run, lambda name=name, loss=loss: self._with_gates(self._continued(name, loss=loss), name))
            for rule in (Rule("gate"), self.rule):
                self.record(
                    run | rule._asdict(),
                    lambda name=name, rule=rule: self._cut(rule, BUDGET, f"{name}-{rule.name}", source=name),
                )

    def _with_gates(self, folder: Path, name: str) -> dict[str, Any]:
        """A model's figures, and what its gates do on the calibration text, as a plan found it."""
        layers = [layer.evidence for layer in self.plan(Rule("gate"), BUDGET, source=name).layers]
        gates = {key: [round(layer[key], 4) for layer in layers] for key in ("gate_mean", "gate_std")}
        return self.quality(folder) | gates

    def stage_recall(self) -> None:
        """The parent after it was taught to look things up: what equal cuts, planned on text, cost in recall."""
        self.record({"stage": "recall", "model": "taught"}, lambda: self._recall(self._taught()))
        for rule in (*CRITERIA, *RANDOM):
            run = {"stage": "recall", "model": "taught", **rule._asdict()}
            self.record(run, lambda rule=rule: self._cut(rule, BUDGET, f"taught-{rule.name}", "taught", self._recall))

    def _taught(self) -> Path:
        folder, options = self.work / "taught", self.options
        if not folder.exists():
            steps = max(1, options.steps // 2)
            model = self.load(self.parent_checkpoint())
            documents = iter(Texts([str(self.sections("train"))]))
            text = calibration_text(model, documents, tokens=steps * TEXT_ROWS * TASK.length, length=TASK.length)
            recipe = Recipe(
                learning_rate=options.learning_rate,
                steps=steps,
                warmup=max(1, steps // 20),
                batch_size=ROWS,
                micro_batch=ROWS,
                seed=0,
                dtype=options.dtype,
            )
            teach(model, text, recipe)
            model.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
        return folder

    def _recall(self, folder: Path) -> dict[str, Any]:
        """Loss on the test file, and what is found of MQAR."""
        model = self.load(folder)
        found, answers = mqar(model)
        return {**self._loss(model), "recall": {"mqar": [round(found, 4), round(answers, 4)]}}

    def stage_costs(self) -> None:
        """Everything that was made, in one run."""
        folders = {"parent": self.parent_checkpoint()}
        folders |= {folder.name: folder for folder in sorted((self.work / "exports").glob("*"))}
        plain = [name for name in self._rivals() if (self.work / name / "done").exists()]
        folders |= {f"plain {name}": find_model(self.work / name) for name in plain}
        models = {name: self.load(folder) for name, folder in folders.items()}
        found = measure_costs(models, context=self.options.context, rounds=self.options.rounds, progress=_say)
        figures = {
            name: {key: round(value, 4) for key, value in cost.against(found["parent"]).items()} | asdict(cost)
            for name, cost in found.items()
        }
        self.record({"stage": "costs", "models": sorted(folders)}, lambda: {"costs": figures})


def _difference(found: list[tuple[float, int]], cut: list[tuple[float, int]]) -> dict[str, Any]:
    """How much more one model loses than another, nats per token; its standard error, from block to block."""
    tokens = sum(count for _, count in cut)
    mean = sum(nats - less for (nats, _), (less, _) in zip(found, cut, strict=True)) / tokens
    rest = [nats - less - mean * count for (nats, _), (less, count) in zip(found, cut, strict=True)]
    error = (len(rest) / (len(rest) - 1) * sum(one**2 for one in rest)) ** 0.5 / tokens
    return {
        "difference": round(mean, 5),
        "standard_error": round(error, 5),
        "cut_loss": round(sum(nats for nats, _ in cut) / tokens, 4),
        "tokens": tokens,
        "blocks": len(rest),
    }


def _plan_figures(plan: PrunePlan) -> dict[str, Any]:
    def letters(layer: LayerDecision) -> str:
        return {"both": "B", "mamba": "M", "attention": "A", "constant": "–"}[layer.keep]

    return {
        "layers": "".join(letters(layer) for layer in plan.layers),
        "heads_cut": sum(layer.num_heads_removed for layer in plan.layers),
        "gates_frozen": sum(layer.gate is not None for layer in plan.layers),
        "expected": {key: round(value, 4) for key, value in plan.expected.items()},
    }


def _say(what: str) -> None:
    print(f"  {what}", flush=True)


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = records.REPOSITORY.parent / "shared" / "data" / "wikitext2"
    cache = Path(__file__).parent / ".cache" / "pruning"
    parser.add_argument("--data", type=Path, default=data, help="folder with train, valid and test.jsonl")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="directory of the records")
    parser.add_argument("--work", type=Path, default=cache, help="directory of models and plans")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--size", choices=SIZES, default="256x6")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order of text; each needs its own --work")
    parser.add_argument("--steps", type=int, default=3000, help="of the parent; healing takes a tenth")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--section", type=int, default=700, help="characters of a document: with its tasks, within a row"
    )
    parser.add_argument("--beginning", type=int, default=160, help="characters of as many shorter documents; 0: none")
    parser.add_argument("--task-prob", type=float, default=0.5, help="share of documents with a fact, and with a list")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--criterion", default="ablation", help="of the frontier and of healing")
    parser.add_argument("--coarse", action="store_true", help="of whole branches alone there")
    parser.add_argument("--frontier", type=float, nargs="+", default=FRONTIER, help="its speeds of decoding")
    parser.add_argument("--heal-frontier", action="store_true", help="heal every cut of the frontier too")
    parser.add_argument("--plain", nargs="*", choices=PLAIN, default=PLAIN, help="plain models beside the cut")
    parser.add_argument("--plain-layers", type=int, nargs="+", default=(), help="more plain models, of so many layers")
    parser.add_argument("--context", type=int, default=4096, help="tokens at which speed and memory count")
    parser.add_argument("--rounds", type=int, default=5, help="of timing in the end")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--report-tokens", type=int, default=100_000, help="of the test file")
    parser.add_argument("--dtype", choices=("float32", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--report", action="store_true", help="only write the tables of the recorded figures")
    parser.add_argument("--discard-old-revisions", action="store_true", help="drop the figures of older code")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    options = arguments(argv)
    study = Study(options)
    if options.discard_old_revisions:
        records.keep_records(study.path, lambda r: r["revision"] == study.revision)
    if not options.report:
        torch.set_num_threads(options.threads)
        for stage in options.stages:
            getattr(study, f"stage_{stage}")()
    print(report(study.path))


if __name__ == "__main__":
    main(sys.argv[1:])
