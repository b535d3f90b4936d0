"""A byte-level BPE tokenizer trained on the user's own files."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fusiontree.data.corpus import Corpus, resolve_paths
from fusiontree.data.records import BadRecord, Conversation
from fusiontree.data.report import DataReport
from fusiontree.errors import InputError

logger = logging.getLogger(__name__)

END_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
_SPECIAL_TOKENS = (END_TOKEN, PAD_TOKEN)
_MIN_VOCAB_SIZE = 256 + len(_SPECIAL_TOKENS)


def train_bpe(
    files: Sequence[str],
    vocab_size: int,
    out_dir: str | os.PathLike[str],
    text_key: str = "text",
    *,
    cache_dir: str | None = None,
    report: DataReport | None = None,
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on JSONL files and leave it in a folder that `AutoTokenizer` loads.

    It knows every byte, so it cuts and restores any text in any script. `<|endoftext|>` (id 0) ends
    documents, `<|pad|>` (id 1) pads. Words are found as GPT-2 finds them (Radford et al., 2019). The same files give
    the same tokenizer.

    Args:
        files: paths and globs.
        vocab_size: tokens in all, at least 258 (256 bytes and the 2 special tokens).
        cache_dir: see `index_lines`.
        report: where to count what was read and skipped; without one, what was skipped is logged.

    Returns:
        The tokenizer, smaller than asked for where the text holds too few pairs to merge.

    Raises:
        InputError: `vocab_size` too small, files that cannot be used, or a folder that cannot be written.
    """
    require_vocabulary(vocab_size)
    out = Path(out_dir).expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a folder for the tokenizer")
    corpus = Corpus(resolve_paths(files, where="the training files"), text_key=text_key, cache_dir=cache_dir)
    corpus.require_text(where="the training files")
    counted = DataReport() if report is None else report
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(corpus, counted), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        clean_up_tokenization_spaces=False,
    )
    _save(tokenizer, out)
    if report is None and counted.skipped:
        logger.warning("tokenizer training: %s", counted.summary())
    return tokenizer


def require_vocabulary(vocab_size: int) -> None:
    """Raises `InputError` unless `vocab_size` holds the 256 bytes and the special tokens."""
    if vocab_size < _MIN_VOCAB_SIZE:
        raise InputError(
            f"a vocabulary of {vocab_size} is too small: byte-level BPE needs at least {_MIN_VOCAB_SIZE} tokens "
            f"(256 bytes and {len(_SPECIAL_TOKENS)} special tokens)"
        )


def _texts(corpus: Corpus, report: DataReport) -> Iterator[str]:
    for source, text in corpus.records():
        if isinstance(text, BadRecord):
            report.add(source, text)
            continue
        report.documents += 1
        if isinstance(text, Conversation):
            yield from (content for message in text.messages if isinstance(content := message.get("content"), str))
        else:
            yield text


def _save(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """File by file into `out`, each complete before it appears; other files there stay."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as temporary:
            tokenizer.save_pretrained(temporary)
            for entry in sorted(Path(temporary).iterdir()):
                os.replace(entry, out / entry.name)
    except OSError as error:
        raise InputError(f"the tokenizer cannot be written to {out}: {error.strerror or error}") from error
