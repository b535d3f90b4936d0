"""`fusiontree eval`."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from fusiontree.cli._options import was_given, whole_numbers
from fusiontree.errors import InputError, nearest

if TYPE_CHECKING:
    from fusiontree.eval.parts import Part
    from fusiontree.eval.texts import Texts
    from fusiontree.models import HybridLanguageModel

REPORT = "eval_report.json"
PICTURE = "perplexity_by_position.png"
HARNESS = "lm_eval:"
PASSKEYS_MAP, MQAR_MAP = "passkeys.png", "mqar.png"
_TASKS = ("needle", "structured", "passkey", "mqar", "code", f"{HARNESS}NAME")
_TEXT_TASKS = ("needle", "structured")
_READ_BY = {
    ("passkey", "mqar"): ("lengths",),
    ("passkey",): ("depths", "passkeys"),
    ("mqar",): ("pairs", "rows", "ids"),
    (f"{HARNESS}NAME",): ("task_folder", "limit", "shots"),
}
"""Tasks, and the options that none but they read."""

_Progress = Callable[..., None]
"""Called with what is done, what there is in all, and a few words."""


def evaluate(
    call: typer.Context,
    model: Path = typer.Argument(..., help="Model folder, or a run directory, whose newest checkpoint is taken."),
    more: list[str] = typer.Argument(None, metavar="[FILES]...", help="More files, as --data *.jsonl gives them."),
    data: list[str] = typer.Option(None, "--data", help="Files or globs: .jsonl, or whole texts of any other suffix."),
    by_position: bool = typer.Option(False, "--by-position", help="Also tabulate perplexity by place in the document."),
    tasks: str = typer.Option(
        "",
        "--tasks",
        help="With commas between: needle, structured (written into the texts, the answers scored), passkey (found, by "
        "depth and length), mqar (associative recall), code (Python functions completed), lm_eval:NAME (of "
        "lm-evaluation-harness).",
    ),
    seed: int = typer.Option(0, "--seed", help="Of what needle and structured write, of passkeys and of mqar."),
    lengths: str = typer.Option("256,512,1024,2048", "--lengths", help="Tokens of passkey's texts, mqar's rows."),
    depths: str = typer.Option("0,0.25,0.5,0.75,1", "--depths", help="Of passkeys: 0 at a text's start, 1 its end."),
    passkeys: int = typer.Option(8, "--passkeys", min=1, help="For each length and depth."),
    pairs: str = typer.Option("4,16,64", "--pairs", help="Of mqar: keys with a value in a row, each asked for."),
    rows: int = typer.Option(16, "--rows", min=1, help="Of mqar, for each length and number of pairs."),
    ids: int = typer.Option(None, "--ids", min=1, help="Of mqar: token ids in use; default: 512 or all."),
    code: list[str] = typer.Option(None, "--code", help="Files or globs for code; default: the .py files of --data."),
    task_folder: Path = typer.Option(
        None, "--task-folder", help="Task files for lm_eval: YAML, and code that they run."
    ),
    limit: int = typer.Option(None, "--limit", min=1, help="Examples of each lm_eval task; default: all."),
    shots: int = typer.Option(None, "--shots", min=0, help="Worked examples before each question of lm_eval tasks."),
    again: bool = typer.Option(False, "--again", help="Measure what the report in --out already holds once more."),
    out: Path = typer.Option(None, "--out", help="Folder for what is written; default: MODEL."),
    text_key: str = typer.Option("text", "--text-key", help="Key of a JSONL record that holds its text."),
    max_tokens: int = typer.Option(None, "--max-tokens", min=1, help="Stop after the document that reaches so many."),
    piece: int = typer.Option(2048, "--piece", min=2, help="Tokens of a forward pass: changes memory and speed alone."),
    mixed_precision: str = typer.Option("no", "--mixed-precision", help="bf16 = under autocast, as in training."),
    device: str = typer.Option(None, "--device", help="cpu or cuda; default: cuda where there is a device."),
    dtype: str = typer.Option(None, "--dtype", help="float32, bfloat16 or float16; default: as saved."),
    weights: str = typer.Option(None, "--weights", help="int8 or int4: round the blocks' linear layers (torchao)."),
) -> None:
    """Perplexity of a model on held-out text: each token once, predicted from all of its document before it.

    Writes eval_report.json and pictures: perplexity_by_position.png, passkeys.png, mqar.png. Bits per byte compare
    models with different tokenizers.

    needle and structured read the texts once more, with facts, lists and sequences in them that are asked for at the
    end; passkey hides numbers in the texts of --data, or in a few sentences over and over; mqar lists keys with their
    values as bare token ids, and asks for each. The report is written after each part: the same command again goes on
    where it was interrupted.
    """
    if mixed_precision not in ("bf16", "no"):
        raise InputError(f"--mixed-precision must be bf16 or no, got {mixed_precision!r}")
    if weights is not None and mixed_precision == "bf16":
        raise InputError("--weights does not go with --mixed-precision bf16: rounded weights compute in --dtype alone")
    wanted = _named(tasks)
    files = [*(data or []), *(more or [])]
    text_tasks = [task for task in _TEXT_TASKS if task in wanted]
    harness = [task.removeprefix(HARNESS) for task in wanted if task.startswith(HARNESS)]
    if text_tasks and not files:
        raise InputError(f"--tasks {text_tasks[0]} is written into texts: give --data FILES")
    if not files and not wanted:
        raise InputError(
            "there is nothing to evaluate: give --data FILES, or --tasks passkey, mqar, code or lm_eval:NAME"
        )
    if by_position and not files:
        raise InputError("--by-position tabulates the perplexity of texts: give --data FILES, or leave it out")
    grid = (sorted(whole_numbers(lengths, "--lengths")), _depths(depths))
    pair_counts = sorted(whole_numbers(pairs, "--pairs"))
    sources = list(code or []) or [path for path in files if path.endswith(".py")]
    if "code" in wanted and not sources:
        raise InputError("--tasks code completes Python functions: give --code FILES")
    if code and "code" not in wanted:
        raise InputError("--code is for --tasks code; --data files are read for perplexity")
    if harness and importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks lm_eval:NAME needs lm-evaluation-harness: pip install 'fusiontree[eval]'")
    _refuse_what_no_task_reads(call, wanted)
    if task_folder is not None and not task_folder.is_dir():
        raise InputError(f"--task-folder {task_folder} is not a folder")
    folder = out or model
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; name a folder")
    from fusiontree.artifacts import EvalReport, directory_for_results
    from fusiontree.cli._evaluation_tables import print_report
    from fusiontree.cli._options import dtype_named, round_weights
    from fusiontree.data.tokenizer import tokenizer_fingerprint
    from fusiontree.deploy.loading import load, loaded_step
    from fusiontree.deploy.reference import model_fingerprint
    from fusiontree.eval.figures import plot_perplexity_by_position
    from fusiontree.eval.parts import run_parts
    from fusiontree.eval.texts import Texts
    from fusiontree.plots import plot_mqar, plot_passkeys

    texts = Texts(files, text_key=text_key, where="--data") if files else None
    programs = Texts(sources, text_key=text_key, where="--code") if "code" in wanted else None
    loaded = load(model, device=device, dtype=dtype_named(dtype))
    fingerprint = model_fingerprint(loaded)  # of the weights as they were saved
    round_weights(loaded, weights)
    settings = {
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "mixed_precision": mixed_precision,
        "device": str(loaded.device),
        "weights": weights,
    }
    with directory_for_results(folder, "--out"), _progress_bars() as shown_as:
        job = _Job(
            model=loaded,
            name=str(model),
            common={
                **settings,
                "model": fingerprint,
                "tokenizer": tokenizer_fingerprint(loaded.tokenizer) if loaded.tokenizer is not None else None,
            },
            piece=piece,
            mixed_precision="bf16" if mixed_precision == "bf16" else "no",
            shown_as=shown_as,
        )
        # Perplexity last: what can be wrong with tasks is then said before the longer wait.
        manager = functools.cache(lambda: _task_manager(harness, task_folder))
        parts = [job.harness(task, task_folder, limit, shots, manager) for task in harness]
        if programs is not None:
            parts.insert(0, job.code(programs, text_key))
        if "mqar" in wanted:
            parts.insert(0, job.mqar(grid[0], pair_counts, rows, ids, seed))
        if "passkey" in wanted:
            parts.insert(0, job.passkeys(texts, text_key, *grid, passkeys, seed))
        if texts is not None:
            text_settings = {"text_key": text_key, "max_tokens": max_tokens}
            if text_tasks:
                parts.insert(0, job.text_tasks(texts, text_tasks, seed, text_settings))
            parts.append(job.perplexity(texts, text_settings))
        try:
            report = run_parts(
                EvalReport(model=str(model), step=loaded_step(loaded), settings=settings),
                parts,
                folder / REPORT,
                again=again,
                on_kept=lambda part: typer.echo(
                    f"{part}: kept from {folder / REPORT} (--again measures it anew)", err=True
                ),
            )
        except KeyboardInterrupt:
            typer.echo("the same command goes on after the last part that was measured", err=True)
            raise
    print_report(report, by_position=by_position)
    print(folder / REPORT)
    for picture in (PICTURE, PASSKEYS_MAP, MQAR_MAP):  # those there are of an earlier report
        (folder / picture).unlink(missing_ok=True)
    if report.by_position:
        print(plot_perplexity_by_position(report, folder / PICTURE))
    if report.passkeys is not None:
        print(plot_passkeys(report.passkeys, folder / PASSKEYS_MAP))
    if report.mqar is not None:
        print(plot_mqar(report.mqar, folder / MQAR_MAP))


def _refuse_what_no_task_reads(call: typer.Context, wanted: list[str]) -> None:
    """
    Raises:
        InputError: an option is given of a task that is not.
    """
    asked = [f"{HARNESS}NAME" if task.startswith(HARNESS) else task for task in wanted]
    for tasks, names in _READ_BY.items():
        for name in names:
            if was_given(call, name) and not any(task in asked for task in tasks):
                option, task = f"--{name.replace('_', '-')}", " or ".join(tasks)
                raise InputError(f"{option} is for --tasks {task}: name that task, or leave the option out")


def _task_manager(tasks: list[str], folder: Path | None) -> Any:
    from fusiontree.eval.lm_eval_adapter import task_manager  # takes seconds, which kept parts need not wait for

    return task_manager(tasks, folder)


def _depths(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= depth <= 1 for depth in found):
        raise InputError(f"--depths must be a number from 0 to 1, or several with commas between, got {text!r}")
    return sorted(set(found))


def _named(tasks: str) -> list[str]:
    """The tasks of `--tasks`, each once.

    Raises:
        InputError: there is none, or one that there is not.
    """
    wanted = list(dict.fromkeys(part.strip() for part in tasks.split(",") if part.strip()))
    known = f"there are {', '.join(_TASKS[:-1])} and {_TASKS[-1]}"
    if tasks and not wanted:
        raise InputError(f"--tasks names no task; {known}")
    for name in wanted:
        if name not in _TASKS[:-1] and not (name.startswith(HARNESS) and name != HARNESS):
            close = nearest(name, _TASKS[:-1])
            raise InputError(f"--tasks: there is no task {name!r}; {f'did you mean {close!r}?' if close else known}")
    return wanted


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all parts share."""

    model: HybridLanguageModel
    name: str
    common: dict[str, Any]
    piece: int
    mixed_precision: Literal["bf16", "no"]
    shown_as: Callable[[str], _Progress]

    @property
    def _options(self) -> dict[str, Any]:
        return {"name": self.name, "piece": self.piece, "mixed_precision": self.mixed_precision}

    def _read_texts(self, description: str, texts: Texts) -> Callable[[int, int], None]:
        show = self.shown_as(description)
        return lambda read, tokens: show(read, texts.num_bytes, f"{tokens:,} tokens")

    def _counted(self, description: str, what: str) -> Callable[[int, int], None]:
        show = self.shown_as(description)
        return lambda done, total: show(done, total, f"{done:,} {what}")

    def perplexity(self, texts: Texts, settings: dict[str, Any]) -> Part:
        from fusiontree.eval.eval_llm import evaluate_perplexity
        from fusiontree.eval.parts import Part, files_identity

        fields = ("data", "tokens", "loss", "perplexity", "by_position", "settings")

        def measure() -> dict[str, Any]:
            progress = self._read_texts("perplexity", texts)
            found = evaluate_perplexity(
                self.model, texts, max_tokens=settings["max_tokens"], progress=progress, **self._options
            )
            progress(texts.num_bytes, found.tokens)  # what stands in the files beside texts counts as read
            return {field: getattr(found, field) for field in fields}

        depends_on = {**self.common, **settings, "files": files_identity(texts.paths)}
        return Part("perplexity", dict.fromkeys(fields), depends_on, measure)

    def text_tasks(self, texts: Texts, tasks: list[str], seed: int, settings: dict[str, Any]) -> Part:
        from fusiontree.eval.parts import Part, files_identity
        from fusiontree.eval.text_tasks import evaluate_tasks

        def measure() -> dict[str, Any]:
            progress = self._read_texts("tasks in texts", texts)
            found = evaluate_tasks(
                self.model,
                texts,
                tasks,
                seed=seed,
                max_tokens=settings["max_tokens"],
                progress=progress,
                **self._options,
            )
            progress(texts.num_bytes, found.tokens)  # what stands in the files beside texts counts as read
            return {"tasks": found}

        depends_on = {**self.common, **settings, "files": files_identity(texts.paths), "tasks": tasks, "seed": seed}
        return Part("tasks in texts", {"tasks": None}, depends_on, measure)

    def passkeys(
        self, texts: Texts | None, text_key: str, lengths: list[int], depths: list[float], rows: int, seed: int
    ) -> Part:
        from fusiontree.eval.parts import Part, files_identity
        from fusiontree.eval.passkeys import evaluate_passkeys

        grid: dict[str, Any] = {"lengths": lengths, "depths": depths, "rows": rows, "seed": seed}

        def measure() -> dict[str, Any]:
            progress = self._counted("passkeys", "passkeys")
            return {"passkeys": evaluate_passkeys(self.model, texts=texts, progress=progress, **grid, **self._options)}

        files = [] if texts is None else files_identity(texts.paths)
        depends_on = {**self.common, **grid, "files": files, "text_key": text_key}
        return Part("passkeys", {"passkeys": None}, depends_on, measure)

    def mqar(self, lengths: list[int], pairs: list[int], rows: int, ids: int | None, seed: int) -> Part:
        from fusiontree.eval.mqar import evaluate_mqar
        from fusiontree.eval.parts import Part

        grid: dict[str, Any] = {"lengths": lengths, "pairs": pairs, "rows": rows, "ids": ids, "seed": seed}

        def measure() -> dict[str, Any]:
            progress = self._counted("associative recall", "rows")
            return {"mqar": evaluate_mqar(self.model, progress=progress, **grid, **self._options)}

        return Part("mqar", {"mqar": None}, {**self.common, **grid}, measure)

    def code(self, texts: Texts, text_key: str) -> Part:
        from fusiontree.eval.code import evaluate_code
        from fusiontree.eval.parts import Part, files_identity

        def measure() -> dict[str, Any]:
            progress = self._counted("code", "functions")
            return {"code": evaluate_code(self.model, texts, progress=progress, **self._options)}

        depends_on = {**self.common, "files": files_identity(texts.paths), "text_key": text_key}
        return Part("code", {"code": None}, depends_on, measure)

    def harness(
        self, task: str, folder: Path | None, limit: int | None, shots: int | None, manager: Callable[[], Any]
    ) -> Part:
        from fusiontree.artifacts import library_versions
        from fusiontree.eval.parts import Part, files_identity
        from fusiontree.eval.task_files import task_files

        def measure() -> dict[str, Any]:
            from fusiontree.eval.lm_eval_adapter import evaluate_harness

            found = evaluate_harness(
                self.model,
                [task],
                folder=folder,
                limit=limit,
                shots=shots,
                progress=self._counted(f"{HARNESS}{task}", "requests"),
                manager=manager(),
                **self._options,
            )
            return {"harness": found}

        depends_on = {
            **self.common,
            "folder": [] if folder is None else files_identity(task_files(folder)),
            "limit": limit,
            "shots": shots,
            "lm_eval": library_versions(["lm_eval"]),
        }
        return Part(f"{HARNESS}{task}", {"harness": [task]}, depends_on, measure, check=manager)


@contextmanager
def _progress_bars() -> Iterator[Callable[[str], _Progress]]:
    """Bars on stderr where that is a terminal: call it with a part's name when the part begins."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:

        def shown_as(description: str) -> _Progress:
            task = bar.add_task(description, total=None, note="")
            return lambda done, total, note: bar.update(task, completed=done, total=total, note=note)

        yield shown_as
