"""English and Chinese corpora beside the checkout, where they are there."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fusiontree.data import DataSettings, build_loader, documents, load_tokenizer, train_bpe
from fusiontree.data.tokenizer import DocumentEncoder


def eval_tokens(settings, tokenizer) -> torch.Tensor:
    loader = build_loader(settings, tokenizer, split="eval", batch_size=8, max_seq_length=512)
    return torch.cat([batch.input_ids[batch.labels >= 0] for batch in loader])


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_wikitext_comes_through_whole(shared_data, tmp_path, kind):
    files = [str(shared_data / "wikitext2" / "valid.jsonl")]
    if kind == "gpt2":
        tokenizer = load_tokenizer(shared_data / "gpt2_tokenizer")
    else:
        tokenizer = train_bpe(files, 2048, tmp_path / "bpe")
    settings = DataSettings(train_paths=files, eval_paths=files)
    texts = [text for text, _ in documents(settings, "eval")]
    assert len(texts) == 60
    tokens = eval_tokens(settings, tokenizer)
    assert tokens.tolist() == [i for ids in DocumentEncoder(tokenizer, tokenizer.eos_token_id)(texts) for i in ids]
    assert tokenizer.decode(tokens[:20_000]) in "".join(text + "<|endoftext|>" for text in texts)
    if kind == "gpt2":
        assert len(tokens) == 258_337


def test_chinese_comes_through_whole(shared_data, tmp_path):
    lines = (shared_data / "zh" / "classical.jsonl").read_bytes().splitlines(keepends=True)
    file = tmp_path / "classical.jsonl"
    file.write_bytes(b"".join(lines[-800:]))
    tokenizer = train_bpe([str(file)], 1000, tmp_path / "bpe")
    settings = DataSettings(eval_paths=str(file))
    texts = [text for text, _ in documents(settings, "eval")]
    assert len(texts) == 800
    assert tokenizer.decode(eval_tokens(settings, tokenizer)) == "".join(text + "<|endoftext|>" for text in texts)


def test_chinese_resumes(shared_data, tokenizer):
    settings = DataSettings(train_paths=str(shared_data / "zh" / "*.jsonl"))

    def loader():
        return build_loader(settings, tokenizer, batch_size=4, max_seq_length=256)

    expected = list(islice(loader(), 20))
    stopped, resumed = loader(), loader()
    list(islice(stopped, 10))
    resumed.load_state_dict(stopped.state_dict())
    for got, want in zip(islice(resumed, 10), expected[10:], strict=True):
        assert torch.equal(got.input_ids, want.input_ids) and torch.equal(got.position_ids, want.position_ids)
