"""When a signal asks a run to stop, and when it ends it."""

from __future__ import annotations

import signal

import pytest

from fusiontree.train.stop import StopRequest


def test_other_signals_ask_for_nothing_more(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopRequest() as request:
        assert not request
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert request.signal is signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
    assert capfd.readouterr().err.count("saving after this step") == 1


def test_the_same_signal_again_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert request.signal is signal.SIGINT
        signal.raise_signal(signal.SIGINT)
