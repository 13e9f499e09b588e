"""Generated requests against the real server: what is malformed is a 4xx, and the server lives on.

Structure-aware: each request is a good one, in JSON or binary, of which some part is replaced, dropped or doubled.
"""

import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.engines.images import samples
from tests.serving import test_server
from tests.serving.test_server import MODEL, Running

from slipstream.serving import client

engine, server = test_server.engine, test_server.server
REQUESTS, SEED = 300, 11
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 5, 2**31, 2**63, -(2**63), 1e308, 0.5, "", "output", "5", "x" * 5000, "\x00", "é", [], {},
    [[]], [None], [{}], {"a": 1}, {"name": "output"}, [1, 1, 16, 16], [-1, 1, 16, 16], [2**40, 1, 16, 16], ["1"] * 4,
    json.loads("[" * 200 + "]" * 200), {"binary_data_size": -1}, {"binary_data_size": 2**70}, {"binary_data": "yes"},
    [{"name": "output"}] * 50, [{"name": "output", "parameters": 5}], "BYTES", "FP16", "INT64", "BOOL", "fp32",
)  # fmt: skip


def good(binary: bool) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(client.body(samples(1)))
    document |= {"id": "a", "parameters": {"binary_data_output": False}, "outputs": [{"name": "output"}]}
    if binary:
        document["inputs"][0].pop("data")
        document["inputs"][0]["parameters"] = {"binary_data_size": 4 * 256}
    return document


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, of lists the first few."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def mutated(document: Any, chance: random.Random) -> Any:
    path = chance.choice(list(places(document)))
    if not path:
        return chance.choice(STRANGE)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    match chance.randrange(4):
        case 0:
            del parent[path[-1]]
        case 1 if isinstance(parent, list):
            parent *= 2
        case _:
            parent[path[-1]] = chance.choice(STRANGE)
    return document


def request(chance: random.Random) -> tuple[bytes, dict[str, str]]:
    binary = chance.random() < 0.5
    document = good(binary)
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        if isinstance(document, dict):
            document = mutated(document, chance)
    head = json.dumps(document).encode()
    content = head + chance.randbytes(chance.choice((0, 3, 1023, 1024, 1024, 1024))) if binary else head
    headers = {"content-type": chance.choice(("application/json", "application/octet-stream", "text/plain", ""))}
    if binary:
        headers["inference-header-content-length"] = chance.choice((str(len(head)),) * 5 + ("0", "-1", "1e3", "x", "9"))
    match chance.randrange(10):
        case 0:
            content = content[: chance.randrange(len(content))]
        case 1:
            at = chance.randrange(len(content))
            content = content[:at] + chance.randbytes(3) + content[at + 3 :]
    if chance.random() < 0.1:
        headers["x-request-id"] = chance.choice(("", "a" * 5000, "%00", "1,2"))
    return content, headers


def test_no_malformed_request_is_the_servers_fault(server: Running) -> None:
    chance, statuses = random.Random(SEED), dict[int, int]()
    before = server.log.stat().st_size
    for number in range(REQUESTS):
        content, headers = request(chance)
        response = server.http.post(client.infer_path(MODEL), content=content, headers=headers)
        assert response.status_code < 500, f"request {number}: {content[:2000]!r} {headers}: {response.text}"
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
    assert statuses.get(200, 0) > 20, statuses  # those that were left as they are, or changed where it means nothing
    assert statuses.get(400, 0) > 100, statuses
    assert server.process.poll() is None
    assert server.post(client.body(samples(1))).status_code == 200
    assert server.log.stat().st_size == before


@pytest.mark.parametrize("kind", ["headers", "body", "nothing"])
def test_half_a_request_is_given_up(server: Running, kind: str) -> None:
    """10 s for the headers; 5 s without a byte of the body, which is answered."""
    path = client.infer_path(MODEL)
    sent = {
        "headers": f"POST {path} HTTP/1.1\r\nhost: a\r\n",
        "body": f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\n{{",
        "nothing": "",
    }[kind]
    with socket.create_connection(("127.0.0.1", server.http.base_url.port or 0), timeout=40) as half:
        half.sendall(sent.encode())
        try:
            answer = half.recv(1000)
        except ConnectionResetError:
            answer = b""
    assert answer.startswith(b"HTTP/1.1 408" if kind == "body" else b"")
    assert bool(answer) == (kind == "body")


def test_headers_without_end_are_not_kept(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.http.base_url.port or 0), timeout=20) as endless:
        endless.sendall(f"GET {client.infer_path(MODEL)} HTTP/1.1\r\n".encode())
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for number in range(1000):
                endless.sendall(f"x-{number}: {'a' * 1000}\r\n".encode())
                time.sleep(0.001)


def test_more_connections_than_are_taken_shut_nobody_out(server: Running) -> None:
    """Those that have gone without a request for longest are closed."""
    address = ("127.0.0.1", server.http.base_url.port or 0)
    held = [socket.create_connection(address, timeout=20) for _ in range(1100)]
    try:
        for _ in range(5):
            assert server.post(client.body(samples(1))).status_code == 200
        assert ended(held[0])
        assert not ended(held[-1])
    finally:
        for connection in held:
            connection.close()


def ended(connection: socket.socket) -> bool:
    """Whether the server closed a connection on which nothing was sent."""
    connection.settimeout(1)
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
