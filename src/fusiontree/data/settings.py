"""What the data section of a run can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fusiontree.config import Settings


def _one_is_a_list(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class FileSource(Settings):
    """Some of the training files, and their share of all documents."""

    paths: tuple[str, ...] = Field((), description="files or globs")
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="share of the documents, relative to the others'")
    text_key: str | None = Field(None, min_length=1, description="null = data.text_key")

    _one_path_is_a_list = field_validator("paths", mode="before")(_one_is_a_list)


class StreamSource(Settings):
    """Something to stream, and its share of all documents."""

    path: str = Field(description="file, glob, http(s) URL, folder that datasets loads, or hub name (@revision)")
    config: str | None = Field(None, description="configuration of a data set")
    split: str | None = Field(
        None, description="split of a data set; null = train, or the one that a saved folder holds"
    )
    weight: float = Field(1.0, gt=0, allow_inf_nan=False, description="share of the documents, relative to the others'")
    text_key: str | None = Field(None, min_length=1, description="null = data.text_key")


def _wikipedia(language: str, weight: float = 1.0) -> StreamSource:
    return StreamSource(path="wikimedia/wikipedia", config=f"20231101.{language}", weight=weight)


#: What `hf_streaming_preset` stands for.
STREAMING_PRESETS: dict[str, tuple[StreamSource, ...]] = {
    "wikipedia_only": (_wikipedia("en"),),
    "english_mix": (
        _wikipedia("en", 0.3),
        StreamSource(path="HuggingFaceFW/fineweb-edu", config="sample-10BT", weight=0.7),
    ),
    "multilingual_mix": (
        _wikipedia("en", 0.4),
        _wikipedia("zh", 0.25),
        _wikipedia("de", 0.1),
        _wikipedia("fr", 0.1),
        _wikipedia("ja", 0.1),
        _wikipedia("es", 0.05),
    ),
}


class DataSettings(Settings):
    """Where the text comes from and how it becomes tokens."""

    data_mode: Literal["lazy", "static", "hf_streaming"] = Field(
        "lazy",
        description="lazy = files are indexed, and tokenised while training; static = tokenised before, by `fusiontree "
        "data tokenise`; hf_streaming = files, URLs and data sets of the hub are read from beginning to end",
    )
    train_paths: tuple[str, ...] = Field((), description="files, globs (** reaches into subfolders) or Arrow folders")
    train_sources: tuple[FileSource, ...] = Field((), description="instead of train_paths: several, mixed by weight")
    eval_paths: tuple[str, ...] = Field((), description="files or globs held out from training")
    hf_streaming_sources: tuple[StreamSource, ...] = Field((), description="what to stream, mixed by weight")
    hf_streaming_preset: Literal["wikipedia_only", "english_mix", "multilingual_mix"] | None = Field(
        None, description="instead of hf_streaming_sources: sets of the hub"
    )
    shuffle_block: int = Field(1024, ge=1, description="records of a stream that are mixed with each other")
    stream_timeout: float = Field(30.0, gt=0, description="seconds that a server may be silent")
    stream_tries: int = Field(10, ge=1, description="attempts without progress before a stream is given up")
    static_dir: str | None = Field(None, description="folder of the tokens, for static")
    tokenizer: str | None = Field(None, description="folder or hub name that AutoTokenizer loads")
    text_key: str = Field("text", min_length=1, description="key of a record's text or messages")
    txt_documents: Literal["file", "line"] = Field("file", description="what of a .txt file is one document")
    num_workers: int = Field(0, ge=0, description="processes that tokenise; 0 = the training process itself")
    shuffle: bool = Field(True, description="a new order of the training documents each epoch; false = file order")
    on_bad_record: Literal["skip", "error"] = Field(
        "skip", description="skip = leave the record out, count and report it; error = stop at the first"
    )
    document_separator: Literal["auto", "eos"] | None = Field(
        "auto", description="token after each document: eos, null = none, auto = eos where the tokenizer has one"
    )
    packing: Literal["concatenate", "best_fit"] = Field(
        "concatenate",
        description="training rows: concatenate = documents end to end, cut at rows' ends; best_fit = only documents "
        "longer than a row are cut, and rows are padded",
    )
    needle_in_haystack_prob: float = Field(
        0.0, ge=0, le=1, description="share of training documents that get a fact and, at their end, its question"
    )
    structured_task_prob: float = Field(
        0.0, ge=0, le=1, description="share of training documents that get a list to recall or a sequence to copy"
    )
    cache_dir: str | None = Field(
        None,
        description="folder of indexes and unpacked files; null = $FUSIONTREE_CACHE or fusiontree/ in the user's cache",
    )

    _one_path_is_a_list = field_validator("train_paths", "eval_paths", mode="before")(_one_is_a_list)
