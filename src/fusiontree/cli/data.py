"""`fusiontree data`: look at training data, check it, tokenise it, train a tokenizer on it."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from fusiontree.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from fusiontree.data.batch import Batch
    from fusiontree.data.inspection import Inspection
    from fusiontree.data.report import DataReport
    from fusiontree.data.settings import DataSettings
    from fusiontree.data.tokenizer import DocumentEncoder
    from fusiontree.train.settings import RunSettings

app = typer.Typer(
    help="Look at training data, check it, tokenise it, train a tokenizer on it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_TEXT_KEY = typer.Option("text", "--text-key", help="Key of a record that holds its text.")
_FILES = typer.Argument(..., metavar="FILES", help="Files or globs.")
_SETTINGS = typer.Argument(None, metavar="[CONFIG] [KEY=VALUE]...", help="A run's YAML file; overrides.")
_CONFIG = typer.Option(None, "--config", metavar="FILE", help="The YAML file, in another way.")
_SHOWN_TOKENS = 400
_COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta")


class Split(str, Enum):
    train = "train"
    eval = "eval"


class TxtDocuments(str, Enum):
    file = "file"
    line = "line"


@app.command()
def tokenizer(
    files: list[str] = _FILES,
    vocab_size: int = typer.Option(..., "--vocab-size", help="Tokens in all; at least 258."),
    out: str = typer.Option(..., "--out", help="Folder for the tokenizer, as AutoTokenizer loads it."),
    text_key: str = _TEXT_KEY,
) -> None:
    """Train a byte-level BPE tokenizer on files."""
    from fusiontree.data.bpe import train_bpe
    from fusiontree.data.report import DataReport
    from fusiontree.data.tokenizer import holds_tokenizer, vocab_size_of

    if holds_tokenizer(Path(out).expanduser()):
        raise InputError(f"--out {out} holds a tokenizer already, which runs may depend on: name another folder")
    report = DataReport()
    size = vocab_size_of(train_bpe(files, vocab_size, out, text_key, report=report))
    print(report.summary())
    fewer = f" (of {vocab_size} asked for: the text holds no more pairs to merge)" if size < vocab_size else ""
    print(f"a tokenizer of {size} tokens{fewer} is in {out}")


@app.command()
def check(
    files: list[str] = _FILES,
    text_key: str = _TEXT_KEY,
    txt_documents: TxtDocuments = typer.Option(
        TxtDocuments.file, "--txt-documents", help="What of a .txt file is one document."
    ),
) -> None:
    """Read every record and say which cannot be used and why; exit code 2 when there are such."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track
    from rich.table import Table

    from fusiontree.data.corpus import Corpus, resolve_paths
    from fusiontree.data.records import BadRecord
    from fusiontree.data.report import DataReport

    corpus = Corpus(resolve_paths(files, where="FILES"), text_key=text_key, txt_documents=txt_documents.value)
    total = DataReport()
    table = Table("file", "MB", "documents", "skipped", "why", box=None)
    progress = Console(stderr=True)
    first = 0
    for file in corpus.files:
        report = DataReport()
        records = corpus.records(first, first + file.lines)
        first += file.lines
        for source, text in track(
            records, escape(file.name), file.lines, console=progress, transient=True, disable=not progress.is_terminal
        ):
            if isinstance(text, BadRecord):
                report.add(source, text)
                total.add(source, text)
            else:
                report.documents += 1
        total.documents += report.documents
        table.add_row(
            escape(file.name),
            f"{file.size / 1e6:,.3f}",
            str(report.documents),
            str(report.total_skipped),
            report.reasons(),
        )
    console = Console(soft_wrap=True)
    console.print(table)
    _print_skipped(console, total)
    if total.skipped:
        raise InputError(f"{total.total_skipped} of {total.documents + total.total_skipped} records cannot be used")
    if not total.documents:
        raise InputError("there is no record at all")
    print(f"all {total.documents} records can be used")


@app.command()
def tokenise(
    arguments: list[str] = _SETTINGS,
    config: str = _CONFIG,
    processes: int = typer.Option(0, "--processes", min=0, help="Processes at a time; 0 = one for each core."),
) -> None:
    """Tokenise a run's files into data.static_dir, for data_mode static; goes on where it was interrupted."""
    import os

    from rich.console import Console
    from rich.progress import Progress

    from fusiontree.data.lazy import LazyDataset
    from fusiontree.data.opening import names_files, open_corpus, static_folder
    from fusiontree.data.static import LongContextDataset
    from fusiontree.data.static import tokenise as tokenise_records
    from fusiontree.data.tokenizer import vocab_size_of

    settings = _run_settings(arguments, config).data
    encoder = _encoder_of(settings)
    kinds: tuple[Literal["train", "eval"], ...] = ("train", "eval")
    splits = [split for split in kinds if names_files(settings, split)]
    if not splits:
        raise InputError("data.train_paths is empty: name at least one file")
    console = Console(stderr=True)
    faulty = 0
    for split in splits:
        folder = static_folder(settings, split)
        records = LazyDataset(open_corpus(settings, split), encoder)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(f"{split} shards")
            steps = tokenise_records(
                records, folder, vocab_size=vocab_size_of(encoder.tokenizer), processes=processes or os.cpu_count() or 1
            )
            for done, shards in steps:
                progress.update(task, completed=done, total=shards)
        report = LongContextDataset(folder).report()
        print(f"{split}: {report.documents} documents in {shards} shard{'' if shards == 1 else 's'} in {folder}")
        _print_skipped(Console(soft_wrap=True), report)
        faulty += report.total_skipped
    if faulty and settings.on_bad_record == "error":
        raise InputError(
            f"{faulty} records cannot be used (data.on_bad_record: skip trains on the others; the tokens are complete)"
        )


def _encoder_of(settings: DataSettings) -> DocumentEncoder:
    from fusiontree.data.tokenizer import DocumentEncoder, load_tokenizer, separator_id_of

    if settings.tokenizer is None:
        raise InputError("data.tokenizer is not set: name a tokenizer folder or a hub name")
    tokenizer = load_tokenizer(settings.tokenizer)
    return DocumentEncoder(tokenizer, separator_id_of(tokenizer, settings.document_separator))


def _run_settings(arguments: list[str] | None, config: str | None) -> RunSettings:
    from fusiontree.train.settings import load_run_settings

    overrides = [argument for argument in arguments or [] if "=" in argument]
    named = [argument for argument in arguments or [] if "=" not in argument] + ([config] if config else [])
    if len(named) != 1:
        raise InputError(f"name one config file, got {', '.join(named) or 'none'}")
    return load_run_settings(named[0], overrides)


@app.command()
def inspect(
    arguments: list[str] = _SETTINGS,
    config: str = _CONFIG,
    split: Split = typer.Option(Split.train, "--split", help="Which files to look at."),
    records: int = typer.Option(1000, "--records", min=1, help="Records to sample for the statistics."),
) -> None:
    """Show what a run's data are: sizes, lengths, scripts, what is skipped and why, and a packed row."""
    from rich.console import Console

    from fusiontree.data.inspection import inspect_corpus, inspect_stream
    from fusiontree.data.loader import build_loader
    from fusiontree.data.opening import open_corpus, open_training_streams

    settings = _run_settings(arguments, config)
    encoder = _encoder_of(settings.data)
    text_tokenizer = encoder.tokenizer
    console = Console(soft_wrap=True, highlight=False)
    if settings.data.data_mode == "hf_streaming" and split is Split.train:
        stream = open_training_streams(settings.data, seed=settings.seed if settings.data.shuffle else None)
        console.print("data_mode hf_streaming: the first records of the stream")
        inspection = inspect_stream(stream, encoder, records=records)
    else:
        corpus = open_corpus(settings.data, split.value)
        files = "1 file" if len(corpus.files) == 1 else f"{len(corpus.files)} files"
        console.print(f"data.{split.value}_paths: {files}, {corpus.num_bytes / 1e6:,.3f} MB, {len(corpus)} lines")
        inspection = inspect_corpus(corpus, encoder, records=records)
    _print_inspection(console, inspection)
    first = settings.length_schedule().at(1).length
    loader = build_loader(
        settings.data.model_copy(update={"num_workers": 0}),
        text_tokenizer,
        split=split.value,
        batch_size=1,
        max_seq_length=first if split is Split.train else settings.training.max_seq_length,
        seed=settings.seed,
    )
    _print_row(console, next(iter(loader)), text_tokenizer)


def _print_inspection(console: Console, inspection: Inspection) -> None:
    lengths = sorted(inspection.lengths)
    of = "" if inspection.of is None else f" of {inspection.of}"
    console.print(f"sample: {inspection.records}{of} records")
    _print_skipped(console, inspection.report)
    if not lengths:
        return
    in_all = "" if inspection.estimated_tokens is None else f", about {inspection.estimated_tokens} in all"
    characters, text_bytes = inspection.characters / inspection.tokens, inspection.text_bytes / inspection.tokens
    console.print(
        f"tokens: {inspection.tokens} in {len(lengths)} documents{in_all}; "
        f"a token is {characters:.2f} characters, {text_bytes:.2f} bytes"
    )
    console.print(
        f"tokens of a document: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}, "
        f"mean {inspection.tokens / len(lengths):.0f}"
    )
    histogram = inspection.histogram()
    most = max(count for _, count in histogram)
    for bound, count in histogram:
        console.print(f"  up to {bound:>8} {count:>7} {'█' * -(-40 * count // most)}")
    letters = sum(inspection.scripts.values())
    shares = {script: count / letters for script, count in inspection.scripts.most_common(8)}
    shown = ", ".join(f"{script} {share:.1%}" for script, share in shares.items() if share >= 0.001)
    console.print(f"characters: {shown}")


def _print_skipped(console: Console, report: DataReport) -> None:
    for kind, skipped in sorted(report.skipped.items()):
        console.print(f"skipped, {kind}: {skipped.count}", markup=False)
        for example in skipped.examples:
            console.print(f"  {example}", markup=False)
    if report.blank_lines:
        console.print(f"blank lines, which hold no record: {report.blank_lines}")


def _print_row(console: Console, batch: Batch, tokenizer: PreTrainedTokenizerBase) -> None:
    """The beginning of a packed row as text, each document on its own background."""
    from rich.text import Text

    from fusiontree.data.inspection import stretches

    parts = list(stretches(batch, 0))
    documents = sum(part.kind == "document" for part in parts)
    length = batch.input_ids.shape[1]
    console.print(f"the first packed row: {length} tokens of {documents} document{'s' if documents > 1 else ''}:")
    text, left = Text(), _SHOWN_TOKENS
    for number, part in enumerate(parts):
        if part.kind == "padding":
            text.append(f"[{len(part.ids)} tokens of padding]", "dim")
            continue
        shown = part.ids[: max(0, left)]
        left -= len(shown)
        if shown:
            text.append(f"[{number + 1}]", "bold reverse")
            text.append(str(tokenizer.decode(shown)), _COLOURS[number % len(_COLOURS)])
    if length > _SHOWN_TOKENS:
        text.append(f" … {length - _SHOWN_TOKENS} more tokens")
    console.print(text)
