from __future__ import annotations

import os
import time
import warnings

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonl_files import text_of, write_jsonl
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusiontree.config import InputError
from fusiontree.data import load_tokenizer, train_bpe, vocab_size_of
from fusiontree.data.corpus import Corpus
from fusiontree.data.lazy import LazyDataset
from fusiontree.data.records import BadRecord
from fusiontree.data.report import DataReport
from fusiontree.data.tokenizer import DocumentEncoder, pad_id_of, separator_id_of, tokenizer_fingerprint


def words(*names: str, opening: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that knows a few words, and nothing else."""
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=names[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if opening:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A </s>", special_tokens=[(opening, vocabulary[opening]), ("</s>", vocabulary["</s>"])]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_bpe_folder_loads_with_transformers_and_keeps_its_special_tokens(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text_of(number)} for number in range(50)])
    trained = train_bpe([path], 300, tmp_path / "new" / "bpe", "body")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "new" / "bpe")
    assert vocab_size_of(loaded) == len(loaded) == 300
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|endoftext|>", "<|pad|>")
    assert (loaded.eos_token_id, loaded.pad_token_id) == (0, 1)
    text = text_of(3)
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert len(loaded(text)["input_ids"]) < len(text) / 2
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(trained)


@given(text=st.text(alphabet=st.characters(blacklist_categories=["Cs"])))
@settings(max_examples=50)
def test_bpe_restores_any_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    if "<|" not in text:
        assert tokenizer.decode(ids) == text


def test_bpe_learns_chinese(tmp_path):
    text = "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？"
    path = write_jsonl(tmp_path / "zh.jsonl", [{"text": text}] * 20)
    trained = train_bpe([path], 400, tmp_path / "bpe")
    assert len(trained(text)["input_ids"]) < len(text)
    assert trained.decode(trained(text)["input_ids"]) == text


def test_bpe_is_the_same_every_time(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text_of(number)} for number in range(300)])
    contents = set()
    for name in ("one", "two", "three"):
        train_bpe([path], 500, tmp_path / name)
        contents.add((tmp_path / name / "tokenizer.json").read_bytes())
    assert len(contents) == 1


def test_bpe_counts_what_it_skips_and_keeps_other_files(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "some words"}, "{", {"text": "more words"}])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    report = DataReport()
    assert vocab_size_of(train_bpe([path], 5000, out, report=report)) < 5000
    assert (report.documents, report.total_skipped) == (2, 1)
    assert (out / "mine.txt").read_text() == "kept"
    assert sorted(os.listdir(out)) == ["mine.txt", "tokenizer.json", "tokenizer_config.json"]


def test_bpe_refuses_the_impossible(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "some words"}])
    with pytest.raises(InputError, match="a vocabulary of 257 is too small: .* at least 258"):
        train_bpe([path], 257, tmp_path / "out")
    assert vocab_size_of(train_bpe([path], 258, tmp_path / "out")) == 258
    with pytest.raises(InputError, match="a.jsonl is a file; name a folder"):
        train_bpe([path], 300, path)
    with pytest.raises(InputError, match="no file matches"):
        train_bpe([str(tmp_path / "*.json")], 300, tmp_path / "out")
    with pytest.raises(InputError, match="none of the 1 records of .* can be used: 1 missing key"):
        train_bpe([path], 300, tmp_path / "out", "body")
    with pytest.raises(InputError, match="the tokenizer cannot be written to .*a.jsonl/out"):
        train_bpe([path], 300, f"{path}/out")


def test_folders_that_hold_no_tokenizer(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model":')
    (broken / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name, problem in [
        (tmp_path / "none" / "here" / "tokenizer", "tokenizer folder .*tokenizer does not exist"),
        ("./none", "tokenizer folder ./none does not exist"),
        (tmp_path / "a.jsonl", "is a file; name the folder"),
        (tmp_path, "holds no tokenizer"),
        (broken, "the tokenizer in .*broken cannot be loaded"),
    ]:
        with pytest.raises(InputError, match=problem) as caught:
            load_tokenizer(name)
        assert "\n" not in str(caught.value)


def test_a_hub_name_out_of_reach_fails_quickly_and_clearly(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    with pytest.raises(InputError, match="nobody/nothing is no folder here, is not in the local hub cache") as caught:
        load_tokenizer("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 15  # transformers itself goes on trying for most of a minute


def test_code_in_a_tokenizer_folder_is_never_run(tmp_path, tokenizer):
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    marker = tmp_path / "was_run"
    (folder / "custom.py").write_text(f"open({str(marker)!r}, 'w')\nclass Custom: pass\n")
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoTokenizer": ["custom.Custom", null]},', 1))
    try:
        load_tokenizer(folder)
    except InputError as error:
        assert "\n" not in str(error)
    assert not marker.exists()


def test_documents_are_encoded_as_the_tokenizer_does_and_closed(tokenizer):
    texts = [text_of(number) for number in range(5)]
    plain = DocumentEncoder(tokenizer, None)(texts)
    assert [ids.tolist() for ids in plain] == [tokenizer(text)["input_ids"] for text in texts]
    closed = DocumentEncoder(tokenizer, 0)(texts)
    assert [ids.tolist() for ids in closed] == [[*tokenizer(text)["input_ids"], 0] for text in texts]
    assert DocumentEncoder(tokenizer, 0)([]) == []


def test_opening_tokens_are_kept_and_closing_ones_are_not():
    tokenizer = words("<unk>", "<s>", "</s>", "a", "b", opening="<s>", eos_token="</s>")
    assert tokenizer("a b")["input_ids"] == [1, 3, 4, 2]
    (ids,) = DocumentEncoder(tokenizer, None)(["a b"])
    assert ids.tolist() == [1, 3, 4]


def test_truncation_saved_with_a_tokenizer_cuts_no_document(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "short")
    short = load_tokenizer(tmp_path / "short")
    short.backend_tokenizer.enable_truncation(2)
    short.model_max_length = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (ids,) = DocumentEncoder(short, None)([text_of(3)])
    assert len(ids) > 10


def test_the_separator_follows_the_setting(tokenizer):
    without = words("<unk>", "a")
    assert separator_id_of(tokenizer, "auto") == separator_id_of(tokenizer, "eos") == 0
    assert separator_id_of(tokenizer, None) is None
    assert separator_id_of(without, "auto") is None
    with pytest.raises(InputError, match="data.document_separator is eos but the tokenizer has no end token"):
        separator_id_of(without, "eos")
    assert pad_id_of(tokenizer) == 1
    assert pad_id_of(without) == 0
    assert pad_id_of(words("<unk>", "</s>", eos_token="</s>")) == 1


def test_a_text_without_tokens_is_a_bad_record(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0}))
    backend.normalizer = normalizers.Replace("b", "")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    corpus = Corpus([write_jsonl(tmp_path / "a.jsonl", [{"text": "a a"}, {"text": "b"}])])
    dataset = LazyDataset(corpus, DocumentEncoder(tokenizer, 0))
    assert dataset[0].tolist() == [0, 0, 0]
    assert isinstance(dataset[1], BadRecord) and dataset[1].kind == "no tokens"


def test_vocab_size_counts_tokens_added_later(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "more")
    more = load_tokenizer(tmp_path / "more")
    more.add_tokens(["<new>"])
    assert vocab_size_of(more) == vocab_size_of(tokenizer) + 1


def test_gpt2_folder(shared_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt2 = load_tokenizer(shared_data / "gpt2_tokenizer")
        (ids,) = DocumentEncoder(gpt2, gpt2.eos_token_id)(["Hello world" * 2000])
    assert vocab_size_of(gpt2) == 50257
    assert ids[0] == 15496 and ids[-1] == 50256
