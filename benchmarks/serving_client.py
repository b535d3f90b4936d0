"""A served model and its clients: the server's process, streamed requests, and what a greedy answer has to be."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import torch

from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.sampling import SamplingOptions
from fusiontree.deploy.text import TextDecoder
from fusiontree.eval.near_ties import TOLERANCE

_PATIENCE_S = 1800.0
# A piece of text may have been held back for a few tokens.
_HELD_TOKENS = 4


class Server:
    """`fusiontree serve` in a process of its own."""

    def __init__(self, folder: Path, threads: int, *arguments: str) -> None:
        command = [sys.executable, "-m", "fusiontree", "serve", str(folder), "--port", "0", "--device", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self._log = (folder / "server.log").open("w+")
        self._process = subprocess.Popen([*command, *arguments], stderr=self._log, env=environment)
        self.url = self._address()

    def _address(self) -> str:
        end = time.monotonic() + _PATIENCE_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise SystemExit(f"error: the server ended: {Path(self._log.name).read_text()[-2000:]}")
            for line in Path(self._log.name).read_text().splitlines():
                if '"listening"' in line:
                    return json.loads(line)["address"]
            time.sleep(0.1)
        raise SystemExit("error: the server does not listen")

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=_PATIENCE_S)
        self._log.close()

    def resident_bytes(self) -> int:
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise SystemExit("error: /proc does not say how large the server is")

    def figures(self) -> dict[str, float]:
        """What it tells Prometheus."""
        lines = httpx2.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@dataclass
class Reply:
    """What came of a streamed request; times in seconds from its start.

    reason: why it ended; None where we left before, or it was lost.
    """

    text: str = ""
    reason: str | None = None
    tokens: int = 0
    first: float | None = None
    seconds: float = 0.0
    status: int = 200


async def ask(client: httpx2.AsyncClient, fields: dict[str, Any], leave_after: float | None = None) -> Reply:
    """One streamed completion; `leave_after`: seconds after which the connection is cut."""
    reply, begun = Reply(), time.perf_counter()
    body = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0} | fields

    async def read() -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            reply.status = response.status_code
            if response.status_code != 200:
                await response.aread()
                return
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if usage := event.get("usage"):
                    reply.tokens = usage["completion_tokens"]
                for choice in event.get("choices", ()):
                    reply.first = reply.first or time.perf_counter() - begun
                    reply.text += choice["text"]
                    reply.reason = choice["finish_reason"] or reply.reason

    try:
        await asyncio.wait_for(read(), leave_after)
    except asyncio.TimeoutError:
        pass
    reply.seconds = time.perf_counter() - begun
    return reply


@dataclass(frozen=True)
class Expected:
    """The greedy continuation of a prompt that is read alone.

    texts: after 0, 1, 2 … tokens, as a text that ends there.
    gaps: how far the two best logits lie apart at each token.
    """

    prompt: list[int]
    texts: list[str]
    gaps: list[float]

    @classmethod
    def of(cls, runtime: InferenceRuntime, prompt: list[int], new_tokens: int) -> Expected:
        stream = runtime.stream_ids(prompt, SamplingOptions(max_new_tokens=new_tokens))
        stream.result()
        ids = stream.sequence.generated
        with torch.no_grad():
            logits = runtime.model(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        best = logits.float().topk(2, dim=-1).values
        texts, decoder, shown = [""], TextDecoder(runtime.tokenizer, prompt), ""
        for token in [token for token in ids if token not in runtime.end_ids]:
            shown += decoder.push(token)
            # A text that ends here also shows what more tokens might have changed.
            texts.append(shown + copy(decoder).finish())
        return cls(prompt, texts, (best[:, 0] - best[:, 1]).tolist())

    def verdict(self, text: str, asked: int, is_whole: bool) -> str:
        """Of a text: "equal" (its beginning, where it was left), "near tie" or "wrong"."""
        expected = self.texts[min(asked, len(self.texts) - 1)]
        if text == expected or (not is_whole and self.texts[-1].startswith(text)):
            return "equal"
        same = next((at for at, pair in enumerate(zip(text, expected, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(text), len(expected)) if same is None else same
        token = next((at for at, shown in enumerate(self.texts) if len(shown) > same), len(self.texts)) - 1
        near = self.gaps[max(0, token - _HELD_TOKENS) : token + 2]
        return "near tie" if min(near, default=1.0) < TOLERANCE else "wrong"


@dataclass
class Load:
    """What a load on a server has come to."""

    outcomes: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=Counter)
    firsts: list[float] = field(default_factory=list)
    tokens: int = 0
    resident: list[int] = field(default_factory=list)

    def summary(self, seconds: float) -> dict[str, Any]:
        quarter = max(1, len(self.resident) // 4)
        return {
            "seconds": round(seconds, 1),
            "outcomes": dict(self.outcomes),
            "verdicts": dict(self.verdicts),
            "tokens_per_second": self.tokens / seconds,
            "first_token_median": median(self.firsts) if self.firsts else None,
            "resident_bytes_second_quarter": median(self.resident[quarter : 2 * quarter] or self.resident),
            "resident_bytes_last_quarter": median(self.resident[-quarter:]),
        }


async def run_load(
    server: Server, name: str, pool: list[Expected], *, streams: int, seconds: float, most: int, seed: int
) -> Load:
    """Clients that come, wait, leave in the middle or stay, as many at once as `streams`."""
    load, end = Load(), time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=streams + 8)

    async def live(number: int, client: httpx2.AsyncClient) -> None:
        draw = random.Random(f"{seed}/{number}")
        await asyncio.sleep(draw.random() * min(2.0, seconds / 4))
        while time.monotonic() < end:
            expected, new = draw.choice(pool), draw.randint(1, most)
            leaves = draw.random() < 0.25
            fields = {"model": name, "prompt": expected.prompt, "max_tokens": new}
            reply = await ask(client, fields, draw.uniform(0.01, 2.0) if leaves else None)
            if reply.status == 429:
                load.outcomes["refused"] += 1
                await asyncio.sleep(draw.uniform(0.5, 1.5))
                continue
            if reply.status != 200 or (reply.reason is None and not leaves):
                load.outcomes["lost"] += 1
                continue
            if reply.reason is None and not reply.text:  # nothing of which it could be said that it is right
                load.outcomes["left before any text"] += 1
                continue
            load.outcomes["left" if reply.reason is None else "complete"] += 1
            load.verdicts[expected.verdict(reply.text, new, reply.reason is not None)] += 1
            load.tokens += reply.tokens
            load.firsts += [] if reply.first is None else [reply.first]
            if draw.random() < 0.3:
                await asyncio.sleep(draw.random())

    async def watch() -> None:
        while time.monotonic() < end:
            load.resident.append(server.resident_bytes())
            await asyncio.sleep(min(1.0, seconds / 20))

    async with httpx2.AsyncClient(base_url=server.url, timeout=_PATIENCE_S, limits=limits) as client:
        await asyncio.gather(watch(), *(live(number, client) for number in range(streams)))
    return load
