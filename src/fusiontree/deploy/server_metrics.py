"""What a server tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fusiontree.deploy.engine import Engine
from fusiontree.deploy.sequences import Sequence

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counts of requests and their latencies, and the state of an engine whenever it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter(
            "fusiontree_requests", "Answered requests.", ["path", "status"], registry=self._registry
        )
        self._histograms = {
            name: Histogram(f"fusiontree_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)
            for name, text in (
                ("queue", "From the request to its beginning."),
                ("first_token", "From the request to its first token."),
                ("token", "Between tokens of one text, on average."),
                ("request", "From the request to the end of its text."),
            )
        }

    def count(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def observe(self, sequence: Sequence) -> None:
        """A text that has ended."""
        if sequence.started is None or sequence.first_token is None or sequence.finished is None:
            return
        seconds = {
            "queue": sequence.started - sequence.submitted,
            "first_token": sequence.first_token - sequence.submitted,
            "request": sequence.finished - sequence.submitted,
        }
        if len(sequence.generated) > 1:
            seconds["token"] = (sequence.finished - sequence.first_token) / (len(sequence.generated) - 1)
        for name, value in seconds.items():
            self._histograms[name].observe(value)

    def text(self) -> bytes:
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for at every scrape."""
        engine, scheduler = self._engine, self._engine.scheduler
        prefixes, counts = scheduler.prefixes, scheduler.counts
        gauges = {
            "queue_length": ("Texts that wait to begin.", scheduler.waiting),
            "batch_size": ("Texts that run.", scheduler.running),
            "tokens_per_second": ("Tokens generated per second, of late.", engine.tokens_per_second()),
            "state_bytes": ("Bytes of the states of texts that run.", scheduler.state_bytes),
            "prefix_bytes": ("Bytes of snapshots of prompts.", prefixes.nbytes),
            "prefix_snapshots": ("Snapshots of prompts.", len(prefixes)),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts that were read.", counts.prompt_tokens),
            "generated_tokens": ("Tokens that were generated.", counts.generated_tokens),
            "decoding_steps": ("Steps of decoding.", counts.steps),
            "prefix_hits": ("Prompts of which a prefix was known.", prefixes.counts.hits),
            "prefix_misses": ("Prompts of which none was.", prefixes.counts.misses),
            "prefix_tokens": ("Tokens of prompts that needed no reading.", prefixes.counts.tokens),
            "prefix_evictions": ("Snapshots dropped to stay within the budget.", prefixes.counts.evictions),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"fusiontree_{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"fusiontree_{name}", text, value=value)
