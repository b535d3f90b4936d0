"""Ranks in processes of their own: together they read every document once an epoch, in every data mode."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from jsonl_files import text_of

from fusiontree.data import DataSettings, LazyDataset
from fusiontree.data.corpus import Corpus
from fusiontree.data.static import tokenise
from fusiontree.data.tokenizer import DocumentEncoder

RANK = """
import json, sys
from fusiontree.data import DataSettings, build_loader, load_tokenizer
from fusiontree.data.order import Place
from fusiontree.data.records import BadRecord

settings, tokenizer, rank, world_size = json.loads(sys.argv[1]), load_tokenizer(sys.argv[2]), *map(int, sys.argv[3:])
loader = build_loader(
    DataSettings(**settings), tokenizer, batch_size=1, max_seq_length=64, rank=rank, world_size=world_size
)
for place, content, *_ in loader._source.read(Place()):
    if place.epoch:
        break
    if not isinstance(content, BadRecord):
        print(json.dumps(tokenizer.decode(content[:-1])))
"""


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("mode", ["lazy", "static", "hf_streaming"])
def test_processes_share_every_document_once(corpus, tokenizer, tmp_path, mode, world_size):
    tokenizer.save_pretrained(tmp_path / "bpe")
    settings = DataSettings(data_mode=mode, train_paths=corpus, static_dir=str(tmp_path / "tokens"))
    if mode == "static":
        records = LazyDataset(Corpus(corpus), DocumentEncoder(tokenizer, tokenizer.eos_token_id))
        list(tokenise(records, tmp_path / "tokens" / "train", vocab_size=400))
    arguments = [sys.executable, "-c", RANK, settings.model_dump_json(), str(tmp_path / "bpe")]
    running = [
        subprocess.Popen([*arguments, str(rank), str(world_size)], stdout=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0] * world_size
    texts = [json.loads(line) for output in outputs for line in output.splitlines()]
    assert sorted(texts) == sorted(text_of(number) for number in range(60))
