"""The limits that Envoy puts on clients, and its admin interface, which none of them reaches."""

import json
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.traffic.contract import A, B, engine, load

from slipstream.errors import Unavailable
from slipstream.home import Home
from slipstream.serving.client import MOST_BYTES
from slipstream.traffic.base import Routes
from slipstream.traffic.envoy import EnvoyController
from slipstream.traffic.envoy_admin import Admin

PATH = "/v2/models/net/infer"
HALF_SENT = 1100
"""More than the 1,024 connections that Envoy allows to a server when nothing is set."""


@pytest.fixture
def served(toy_envoy: EnvoyController, tmp_path: Path) -> EnvoyController:
    toy_envoy.deploy(A, engine(tmp_path / "v1" / "engine"))
    toy_envoy.set_routes("net", Routes(weights={"v1": 100}))
    return toy_envoy


@contextmanager
def connected(control: EnvoyController, count: int = 1) -> Iterator[list[socket.socket]]:
    address = urlsplit(control.endpoint("net").url)
    with ExitStack() as stack:
        yield [
            stack.enter_context(socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=30))
            for _ in range(count)
        ]


def document(size: int = 10) -> dict[str, object]:
    return {"inputs": [{"name": "input", "shape": [1, size], "datatype": "FP32", "data": [0.5] * size}]}


def test_half_sent_bodies_stop_no_ordinary_client(served: EnvoyController) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{{"
    with connected(served, HALF_SENT) as sockets:
        for half in sockets:
            half.sendall(head.encode())
        assert {r.status for r in load(served, 40, rate=20).records} == {200}
        sockets[0].settimeout(30)
        assert sockets[0].recv(100).startswith(b"HTTP/1.1 408")  # none is held for longer than the limit


def test_half_sent_headers_are_given_up(served: EnvoyController) -> None:
    with connected(served) as [half]:
        half.sendall(f"POST {PATH} HTTP/1.1\r\nhost: a\r\n".encode())
        begun = time.monotonic()
        assert half.recv(100).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun < 15


def test_a_body_that_no_server_takes_is_refused(served: EnvoyController) -> None:
    response = httpx.post(served.endpoint("net").url + PATH, content=b" " * (MOST_BYTES + 1), timeout=30)
    assert response.status_code == 413


def test_a_large_body_reaches_server_and_mirror(served: EnvoyController, tmp_path: Path) -> None:
    """Beyond Envoy's usual buffer of 1 MiB, retries and copies are given up unless the whole body is buffered."""
    served.deploy(B, engine(tmp_path / "v2" / "engine"))
    served.set_routes("net", Routes(weights={"v1": 100}, mirror="v2"))
    before = served.observe(B).requests
    body = json.dumps(document(1_000_000)).encode()
    assert len(body) > 4 * 2**20
    assert httpx.post(served.endpoint("net").url + PATH, content=body, timeout=30).status_code == 200
    deadline = time.monotonic() + 10
    while served.observe(B).requests == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert served.observe(B).requests == before + 1


def test_clients_do_not_set_time_limits_or_retries(toy_envoy: EnvoyController, tmp_path: Path) -> None:
    toy_envoy.deploy(A, engine(tmp_path / "v1" / "engine", delay_s=0.2))
    toy_envoy.set_routes("net", Routes(weights={"v1": 100}))
    headers = {"x-envoy-upstream-rq-timeout-ms": "1", "x-envoy-upstream-rq-per-try-timeout-ms": "1"}
    response = httpx.post(toy_envoy.endpoint("net").url + PATH, json=document(), headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/v2/models/other%2f..%2fnet/infer", "/v2/models/other%5c..%5cnet/infer"])
def test_escaped_slashes_are_refused(served: EnvoyController, path: str) -> None:
    with connected(served) as [raw]:
        raw.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\n\r\n".encode())
        assert raw.recv(100).startswith(b"HTTP/1.1 400")


def test_headers_with_underscores_are_refused(served: EnvoyController) -> None:
    """`x_request_id` is taken for `x-request-id` by some servers, and not by others."""
    url = served.endpoint("net").url + PATH
    assert httpx.post(url, json=document(), headers={"x_request_id": "1"}).status_code == 400


def test_the_admin_interface_is_the_owners_alone(envoy_home: tuple[Home, str]) -> None:
    home, url = envoy_home
    found = (home.envoy / "admin.sock").stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert Admin(home.envoy).ready()
    assert httpx.get(url + "/config_dump").status_code == 404


def test_no_admin_interface_is_unavailable(tmp_path: Path) -> None:
    assert not Admin(tmp_path).ready()
    with pytest.raises(Unavailable, match="admin interface at"):
        Admin(tmp_path).json("/stats")


def test_a_long_home_has_an_admin_interface_too(tmp_path: Path) -> None:
    """The path of a Unix socket may have 107 bytes."""
    folder = tmp_path / ("a" * 120)
    folder.mkdir()
    with pytest.raises(Unavailable, match="No such file"):
        Admin(folder).text("/ready")
