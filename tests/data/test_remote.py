"""Bytes over HTTP: all of them, once and in order, or one sentence that says why not."""

from __future__ import annotations

import logging
import random
import time

import pytest
from http_files import Fault, file_server

from fusiontree.data.remote import Patience, RemoteFile, Version
from fusiontree.errors import InputError

CONTENT = random.Random(0).randbytes(300_000)
QUICK = Patience(timeout=5, tries=4, pause=0.01)
IMPATIENT = Patience(timeout=0.4, tries=4, pause=0.01)  # for servers that stall


@pytest.fixture
def server():
    with file_server() as running:
        yield running


def read(url: str, patience: Patience = QUICK) -> bytes:
    return b"".join(RemoteFile(url, patience).chunks())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_healthy_server(server, chunked):
    assert read(server.add("a", CONTENT, chunked=chunked)) == CONTENT
    assert server.requests == [("/a", None)]
    assert read(server.add("empty", b"", chunked=chunked)) == b""


@pytest.mark.parametrize("ranges", ["yes", "ignored"])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("kind", ["drop", "end", "stall"])
def test_a_broken_body_goes_on_where_it_broke(server, kind, chunked, ranges):
    faults = [Fault(kind, 100_000), Fault(status=503), Fault(kind, 130_000), Fault(kind, 0), Fault(kind, 170_000)]
    url = server.add("a", CONTENT, faults=faults, chunked=chunked, ranges=ranges)
    assert read(url, Patience(timeout=0.4, tries=8, pause=0.01)) == CONTENT
    assert not server.files["/a"].faults
    assert server.requests[0] == ("/a", None)
    if kind != "drop":  # a reset may take bytes with it that were on their way
        assert ("/a", "bytes=100000-") in server.requests


def test_many_random_breaks(server):
    generator = random.Random(1)
    for number in range(10):
        faults = [
            Fault(generator.choice(["drop", "end"]), generator.randrange(60_000)) for _ in range(generator.randrange(9))
        ]
        url = server.add(str(number), CONTENT, faults=faults, ranges=generator.choice(["yes", "ignored"]))
        assert read(url, Patience(timeout=2, tries=12, pause=0)) == CONTENT


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 429])
def test_an_answer_that_says_later_is_waited_for(server, status, caplog):
    url = server.add("a", CONTENT, faults=[Fault(status=status)] * 3)
    assert read(url) == CONTENT
    assert len(server.requests) == 4
    assert f"the server answered {status}" in caplog.text and "try 4 of 4" in caplog.text


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_an_answer_that_says_no_is_believed_at_once(server, status):
    url = server.add("a", CONTENT, always=Fault(status=status))
    with pytest.raises(InputError, match=f"{url} cannot be read: the server answered {status} .*; check the URL"):
        read(url)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [Fault(status=500), Fault("drop"), Fault("end"), Fault("stall")])
def test_a_server_that_stays_down_is_given_up(server, fault):
    url = server.add("a", CONTENT, always=fault)
    begun = time.monotonic()
    with pytest.raises(InputError, match=rf"^{url} cannot be read: .*, after 4 tries in a row; once it can be reached"):
        read(url, IMPATIENT)
    assert time.monotonic() - begun < 4 * IMPATIENT.timeout + 4
    assert len(server.requests) == 4


def test_no_server_at_all():
    with file_server() as gone:
        url = f"{gone.address}/a"
    with pytest.raises(InputError, match=r"the connection failed .*Connection refused.* after 4 tries"):
        read(url)
    with pytest.raises(InputError, match="after 4 tries"):
        RemoteFile(url, QUICK).version()


def test_the_same_bytes_again_are_no_progress(server):
    """A server that cannot begin in the middle and always breaks off at the same place."""
    url = server.add("a", CONTENT, always=Fault("end", 1000), ranges="ignored")
    with pytest.raises(InputError, match=r"received 1000 bytes, expected 300000.*, after 4 tries"):
        read(url)
    assert len(server.requests) == 5  # the first one brought something


def test_new_bytes_are_progress(server):
    url = server.add("a", CONTENT, always=Fault("end", 20_000))
    assert read(url) == CONTENT
    assert len(server.requests) == 15


@pytest.mark.parametrize("ranges", ["yes", "ignored"])
def test_content_that_changes_between_tries_is_refused(server, ranges):
    url = server.add("a", CONTENT, faults=[Fault("end", 1000), Fault(etag='"two"')], ranges=ranges)
    with pytest.raises(InputError, match=f"^{url} has changed since this run began to read it"):
        read(url)


@pytest.mark.parametrize("other", [CONTENT[:500], CONTENT[:1000], CONTENT + b"more"])
@pytest.mark.parametrize("ranges", ["yes", "ignored"])
def test_content_of_another_length_is_refused(server, other, ranges):
    url = server.add("a", CONTENT, faults=[Fault("end", 1000)], ranges=ranges)
    chunks = RemoteFile(url, QUICK).chunks()
    assert next(chunks)
    server.files["/a"].content = other
    with pytest.raises(InputError, match="has changed"):
        for _ in chunks:
            pass


def test_content_that_changes_between_two_readings_is_refused(server):
    url = server.add("a", CONTENT)
    file = RemoteFile(url, QUICK)
    assert file.version() == Version(len(CONTENT), '"one"', None)
    assert b"".join(file.chunks()) == CONTENT
    server.add("a", CONTENT, etag='"two"')
    with pytest.raises(InputError, match="has changed"):
        next(file.chunks())


def test_a_body_that_broke_right_at_its_end(server):
    url = server.add("a", CONTENT, faults=[Fault("end", len(CONTENT))], chunked=True)
    assert read(url) == CONTENT
    assert server.requests[1:] == [("/a", "bytes=300000-")]


def test_answers_that_hold_less_than_was_asked_for(server):
    assert read(server.add("a", CONTENT, faults=[Fault("end", 1000)], ranges="short")) == CONTENT
    assert [asked for _, asked in server.requests] == [None, *(f"bytes={1000 + 70_000 * n}-" for n in range(5))]


def test_an_answer_from_another_byte_is_not_taken(server):
    url = server.add("a", CONTENT, faults=[Fault("end", 1000)], ranges="wrong")
    with pytest.raises(InputError, match="answered from byte 999 on when asked for byte 1000, after 4 tries"):
        read(url)


def test_redirects_are_followed_every_time(server):
    url = server.add("a", CONTENT, faults=[Fault("end", 1000)])
    moved = server.add("b", b"", headers={"Location": url})
    assert read(moved) == CONTENT
    assert ("/a", "bytes=1000-") in server.requests
    circle = server.add("c", b"", headers={"Location": f"{server.address}/c"})
    with pytest.raises(InputError, match="redirects"):
        read(circle)


def test_keys_in_a_url_are_sent_and_not_shown(server):
    url = server.add("a", CONTENT).replace("http://", "http://user:secret@") + "?signature=secret#part"
    file = RemoteFile(url, QUICK)
    assert file.name == f"{server.address}/a"
    assert b"".join(file.chunks()) == CONTENT


@pytest.mark.parametrize("url", ["http://", "https:///a", "http://host:port/a"])
def test_what_is_no_url(url):
    with pytest.raises(InputError, match="no usable URL"):
        RemoteFile(url, QUICK)


def test_who_stops_early_leaves_nothing_open(server, recwarn):
    chunks = RemoteFile(server.add("a", CONTENT * 20), QUICK).chunks()
    next(chunks)
    chunks.close()
    assert not recwarn.list


def test_impossible_patience():
    for impossible in ({"timeout": 0}, {"tries": 0}, {"pause": -1}):
        with pytest.raises(InputError, match="timeout must be above 0"):
            Patience(**impossible)


def test_pauses_grow_and_the_programs_own_random_numbers_are_left_alone(server, monkeypatch, caplog):
    caplog.set_level(logging.WARNING)
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    state = random.getstate()
    url = server.add("a", CONTENT, always=Fault(status=500))
    with pytest.raises(InputError):
        read(url, Patience(timeout=2, tries=10, pause=1))
    assert random.getstate() == state
    longest = [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert len(pauses) == len(longest)
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))
