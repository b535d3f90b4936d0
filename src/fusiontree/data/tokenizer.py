"""Tokenizers that AutoTokenizer loads, and how documents become token ids with them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusiontree.data.chat import ConversationEncoder
from fusiontree.data.records import NO_TOKENS, BadRecord, Content, Conversation
from fusiontree.errors import InputError, first_line

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_S = 10.0

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")

# Several scripts, digits, spaces and code: what two tokenizers of one vocabulary would most likely cut differently.
_PROBE = "The  quick-brown fox's 1234567 jumps\n\tover; naïve Größe 学而时习之，不亦说乎？ これは 한국어 f(x): x**2 🙂"


def holds_tokenizer(folder: Path) -> bool:
    """Whether any of the files that tokenizers are saved in lies in `folder`."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, or by hub name from the local cache or the hub. Never runs code that comes with it.

    Raises:
        InputError: no such folder, a folder without a usable tokenizer, or a hub name that is unknown or out of reach.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        raise InputError(f"tokenizer {name} is a file; name the folder it lies in")
    if not _is_hub_name(name):
        raise InputError(f"tokenizer folder {name} does not exist")
    return _from_hub(name)


def _from_folder(path: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for broken files
        names = sorted(entry.name for entry in path.iterdir())
        if not any("token" in name or "vocab" in name or name.endswith(".model") for name in names):
            raise InputError(f"tokenizer folder {path} holds no tokenizer (a tokenizer.json, for one)") from error
        raise InputError(f"the tokenizer in {path} cannot be loaded: {first_line(error)}") from error


def _is_hub_name(name: str) -> bool:
    if name.startswith((".", "~", os.sep)) or name.endswith(os.sep):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=True)
    except Exception:
        logger.info("tokenizer %s is not in the local cache; asking the hub", name)
    try:
        # Asked first because loading retries an unreachable hub for the better part of a minute.
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"tokenizer {name} is no folder here, is not in the local hub cache, and the hub did not provide it "
            f"({first_line(error)}); name a local folder, or load it once where there is a network"
        ) from error


def vocab_size_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding needs for this tokenizer: its largest id + 1, tokens added later included."""
    return max(tokenizer.get_vocab().values()) + 1


def token_bytes(tokenizer: PreTrainedTokenizerBase, token_id: int) -> int:
    """Bytes of text that a token stands for, also where it is a part of a character."""
    text = tokenizer.decode([token_id])
    if "\ufffd" not in text:
        return len(text.encode("utf-8"))
    piece = tokenizer.convert_ids_to_tokens(token_id)
    # A single byte as SentencePiece writes it; byte-level vocabularies write one character for each byte.
    return 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else len(piece)


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill rows with: the padding token, else the end token, else 0 (the fill is never counted)."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hexadecimal digest of the vocabulary and of how a probe text is cut; survives saving and loading."""
    vocabulary = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
    cut = tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"]
    return hashlib.sha256(json.dumps([vocabulary, list(cut)]).encode()).hexdigest()[:32]


class DocumentEncoder:
    """Texts and conversations to token ids, as a document is laid into a row.

    The tokenizer's own opening tokens (a `<s>` that it puts before every text, and so before every prompt too) are
    kept; of what it puts behind a text nothing is kept, and `separator_id` is appended instead.

    Args:
        separator_id: id of the token after each document; None = none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator_id: int | None) -> None:
        self.tokenizer = tokenizer
        self.prefix = opening_tokens(tokenizer)
        self.separator_id = separator_id
        self.conversation = ConversationEncoder(tokenizer, separator_id)

    def identity(self) -> dict[str, object]:
        """What the ids depend on, as plain values."""
        template = self.tokenizer.chat_template
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "separator_id": self.separator_id,
            "chat_template": None if template is None else hashlib.sha256(str(template).encode()).hexdigest()[:32],
        }

    def records(self, contents: Sequence[Content]) -> list[np.ndarray | BadRecord]:
        """Signed int32 ids (see `packing`) of each record, or why it has none.

        Raises:
            InputError: there are conversations, and the tokenizer cannot encode any.
        """
        texts = iter(self([content for content in contents if isinstance(content, str)]))
        return [
            content
            if isinstance(content, BadRecord)
            else self.conversation(content)
            if isinstance(content, Conversation)
            else _or_no_tokens(next(texts))
            for content in contents
        ]

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 ids of each text; empty, without opening and separator, where the tokenizer finds no token in it."""
        suffix = [] if self.separator_id is None else [self.separator_id]
        return [
            np.array([*self.prefix, *ids, *suffix] if len(ids) else [], dtype=np.int32) for ids in self._encode(texts)
        ]

    def plain(self, text: str) -> list[int]:
        """The ids of a text without opening and separator."""
        return list(self._encode([text])[0])

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        # As `tokenizer(...)` does for untruncated texts, without the offsets and masks that it would compute too.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _or_no_tokens(ids: np.ndarray) -> np.ndarray | BadRecord:
    return ids if len(ids) else BadRecord(NO_TOKENS, "the tokenizer finds no token in the text")


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that `tokenizer(text)` puts before a text by itself, such as a beginning-of-sequence token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def separator_id_of(tokenizer: PreTrainedTokenizerBase, separator: str | None) -> int | None:
    """The id of `data.document_separator` ("auto", "eos" or None).

    Raises:
        InputError: "eos" with a tokenizer that has no end token.
    """
    if separator is None or (separator == "auto" and tokenizer.eos_token_id is None):
        return None
    if tokenizer.eos_token_id is None:
        raise InputError(
            "data.document_separator is eos but the tokenizer has no end token; set it to null or change the tokenizer"
        )
    return int(tokenizer.eos_token_id)
