import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import free_port
from tests.traffic.contract import split

from slipstream.contract import Release
from slipstream.errors import Unavailable
from slipstream.traffic.base import Endpoint, Routes
from slipstream.traffic.fake import Behaviour, FakeController
from slipstream.traffic.load import Load, Record, send


@pytest.fixture
def control(tmp_path: Path) -> Iterator[FakeController]:
    fake = FakeController(tmp_path)
    fake.deploy(Release(model="net", name="v1"), tmp_path)
    fake.set_routes("net", Routes(weights={"v1": 100}))
    yield fake
    fake.close()


def load(end: Endpoint, requests: int = 40, rate: float = 100) -> Load:
    return Load(end, "net", "run", "shadow", split(16), requests, rate, seed=3)


def nothing(records: Sequence[Record]) -> None:
    return None


def test_requests_are_paced_named_and_in_seeded_order(control: FakeController) -> None:
    seen = []
    wanted = load(control.endpoint("net"))
    sent = send(wanted, nothing, lambda done, total: seen.append((done, total)))
    records = sorted(sent.records, key=lambda r: r.at)
    assert [r.id for r in records] == [f"run-shadow-{i}" for i in range(40)]
    assert [r.sample for r in records] == list(wanted.samples())
    assert set(wanted.samples()) == set(range(16))
    assert [r.index for r in records] == list(range(40))
    assert np.diff([r.at for r in records]) == pytest.approx(np.diff(wanted.times_s()), abs=1e-6)
    assert seen[-1] == (40, 40)
    assert sent.aborted is None
    assert all(r.latency_ms >= r.served_ms >= 0 for r in records)


def test_a_stalled_server_does_not_slow_the_sending(control: FakeController) -> None:
    control.misbehave(Release(model="net", name="v1"), Behaviour(latency_s=0.8))
    begun = time.monotonic()
    sent = send(load(control.endpoint("net")), nothing, lambda done, total: None)
    assert time.monotonic() - begun < 20  # one after the other would take 32 s
    assert all(r.latency_ms >= 800 for r in sent.records)


def test_a_reason_stops_the_load(control: FakeController) -> None:
    def watch(records: Sequence[Record]) -> str | None:
        return "enough" if len(records) >= 5 else None

    sent = send(load(control.endpoint("net"), requests=10_000), watch, lambda done, total: None)
    assert sent.aborted == "enough"
    assert len(sent.records) < 1000


def test_a_breach_in_the_last_answers_is_seen(control: FakeController) -> None:
    def watch(records: Sequence[Record]) -> str | None:
        return "late" if len(records) == 3 else None

    assert send(load(control.endpoint("net"), requests=3, rate=1000), watch, lambda done, total: None).aborted == "late"


def test_a_guard_that_cannot_look_stops_the_load(control: FakeController) -> None:
    def watch(records: Sequence[Record]) -> str | None:
        raise Unavailable("the splitter does not answer")

    with pytest.raises(Unavailable, match="does not answer"):
        send(load(control.endpoint("net"), requests=10_000), watch, lambda done, total: None)


def test_progress_that_cannot_be_reported_holds_up_neither_load_nor_guard(control: FakeController) -> None:
    calls: list[int] = []
    blocked, send_returned, released_late = threading.Event(), threading.Event(), threading.Event()
    answered: list[int] = []

    def tell(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > 1:  # the first failure must not end the reports
            blocked.set()
            if not send_returned.wait(60):  # as MLflow does when it is away
                released_late.set()
        raise Unavailable("MLflow does not answer")

    def watch(records: Sequence[Record]) -> str | None:
        if blocked.is_set():
            answered.append(len(records))
        return "the load went on" if len(set(answered)) >= 3 else None

    sent = send(load(control.endpoint("net"), requests=10_000), watch, tell)
    send_returned.set()
    assert sent.aborted == "the load went on", "while a report was blocked, the guard looked and answers arrived"
    assert not released_late.is_set()


def test_the_sender_mirrors_where_it_is_told_to(control: FakeController, tmp_path: Path) -> None:
    shadow = FakeController(tmp_path / "shadow")
    shadow.folder.mkdir()
    shadow.deploy(Release(model="net", name="v2"), tmp_path)
    shadow.set_routes("net", Routes(weights={"v2": 100}))
    shadow.misbehave(Release(model="net", name="v2"), Behaviour(latency_s=0.5))
    try:
        sent = send(replace(load(control.endpoint("net")), mirror=shadow.endpoint("net")), nothing, lambda d, t: None)
    finally:
        shadow.close()
    later_ms = []
    for record in sent.records:
        copy = record.mirrored
        assert copy is not None
        later_ms.append(copy.latency_ms - record.latency_ms)
        assert (copy.id, copy.sample, copy.release, record.release) == (record.id, record.sample, "v2", "v1")
        assert copy.latency_ms >= 500
        np.testing.assert_array_equal(copy.output, record.output)
    assert np.median(later_ms) > 250  # the copy holds nobody back
    path = shadow.answers(Release(model="net", name="v2"))
    assert len(path.read_text().splitlines()) == 40


def test_a_mirror_that_is_dead_fails_the_copies_alone(control: FakeController) -> None:
    dead = replace(load(control.endpoint("net"), requests=5), mirror=Endpoint(f"http://127.0.0.1:{free_port()}"))
    for record in send(dead, nothing, lambda done, total: None).records:
        assert not record.failed
        assert record.mirrored is not None
        assert record.mirrored.failed


def test_a_host_of_its_own_is_sent_along(control: FakeController) -> None:
    assert Endpoint("http://127.0.0.1:1", "net.example.test").headers == {"host": "net.example.test"}
    named = Endpoint(control.endpoint("net").url, "net.example.test")
    assert not any(r.failed for r in send(load(named, requests=5), nothing, lambda done, total: None).records)
    assert control.hosts == {"net.example.test"}


def test_nobody_there_is_a_record_and_no_exception() -> None:
    sent = send(load(Endpoint(f"http://127.0.0.1:{free_port()}"), requests=5), nothing, lambda done, total: None)
    assert [(r.status, r.failed, r.release) for r in sent.records] == [(0, True, None)] * 5


def test_errors_have_no_output(control: FakeController) -> None:
    control.misbehave(Release(model="net", name="v1"), Behaviour(error_rate=1.0))
    sent = send(load(control.endpoint("net"), requests=5), nothing, lambda done, total: None)
    assert {(r.status, r.failed, r.release) for r in sent.records} == {(500, True, "v1")}


def test_outputs_are_those_of_the_sample(control: FakeController) -> None:
    wanted = load(control.endpoint("net"), requests=5)
    for record in send(wanted, nothing, lambda done, total: None).records:
        assert record.output is not None
        np.testing.assert_allclose(record.output, wanted.split.inputs[record.sample][None], rtol=1e-5)


def test_requests_arrive_as_a_seeded_poisson_process() -> None:
    """Exponential gaps: their mean is one over the rate, their spread as large as their mean."""
    wanted = load(Endpoint("http://127.0.0.1:1"), requests=20_000, rate=100)
    gaps_s = np.diff(wanted.times_s())
    assert gaps_s.mean() == pytest.approx(0.01, rel=0.05)
    assert gaps_s.std() == pytest.approx(0.01, rel=0.05)
    np.testing.assert_array_equal(wanted.times_s(), replace(wanted).times_s())
    assert (replace(wanted, seed=4).times_s() != wanted.times_s()).all()


def test_a_refusal_is_told_from_an_error(control: FakeController) -> None:
    control.misbehave(Release(model="net", name="v1"), Behaviour(refuse_rate=1.0))
    sent = send(load(control.endpoint("net"), requests=5), nothing, lambda done, total: None)
    assert {(r.status, r.failed, r.refused) for r in sent.records} == {(429, True, True)}


def test_a_request_that_is_never_answered_has_no_release(control: FakeController) -> None:
    control.misbehave(Release(model="net", name="v1"), Behaviour(hang_rate=1.0))
    sent = send(load(control.endpoint("net"), requests=5), nothing, lambda done, total: None)
    assert {(r.status, r.failed, r.release) for r in sent.records} == {(0, True, None)}
