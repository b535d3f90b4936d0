"""What the data section of a run can be told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fusiontree.config import Settings


class DataSettings(Settings):
    """Where the text comes from and how it becomes tokens."""

    data_mode: Literal["lazy"] = Field("lazy", description="lazy = indexed JSONL files, tokenised while training")
    train_paths: tuple[str, ...] = Field((), description="JSONL files or globs (** reaches into subfolders)")
    eval_paths: tuple[str, ...] = Field((), description="JSONL files or globs held out from training")
    tokenizer: str | None = Field(None, description="folder or hub name that AutoTokenizer loads")
    text_key: str = Field("text", min_length=1, description="key of a record that holds its text")
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
        None, description="folder of the line indexes; null = $FUSIONTREE_CACHE or fusiontree/ in the user's cache"
    )

    @field_validator("train_paths", "eval_paths", mode="before")
    @classmethod
    def _one_path_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value
