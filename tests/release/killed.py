"""Kills at every write, found by watching the connections: what changes MLflow's state, and what changes the traffic.

No write is named here. Every HTTP request that may change something counts (any method but GET, and no search), and
every method of the traffic protocol that is not known to read.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
from mlflow.exceptions import MlflowException

from slipstream.errors import SlipstreamError, Unavailable
from slipstream.traffic.base import TrafficController

READS = {"deployed", "releases", "routes", "observe", "endpoint", "mirror", "answers"}
CHANGES = {name for name in vars(TrafficController) if not name.startswith("_")} - READS


class Killed(BaseException):
    """Stands for kill -9: not an Exception, and after it no write of the dead process reaches anything."""


class Fuse:
    """Counts writes of the thread that it was made in, and of the threads that it starts; stops before or after one.

    `before`: runs in front of the write with this number (from 0), such as a whole rollback by another process, or
    raises Killed. `lost`: the write with this number is done, but its answer is lost.
    """

    def __init__(self, at: int | None = None, before: Callable[[], None] | None = None, *, lost: bool = False) -> None:
        self.at, self.before, self.lost = at, before, lost
        self.writes: list[str] = []
        self.dead = self.paused = False

    def write(self, what: str, call: Callable[[], Any]) -> Any:
        if self.paused:
            return call()
        if self.dead:
            raise Killed
        number = len(self.writes)
        self.writes.append(what)
        if number == self.at and not self.lost:
            if self.before is None:
                self.dead = True
                raise Killed
            self.paused = True
            try:
                self.before()
            finally:
                self.paused = False
        result = call()
        if number == self.at and self.lost:
            raise requests.ConnectionError("the answer was lost")
        return result

    @contextlib.contextmanager
    def watching(self, controller: Any) -> Iterator[Any]:
        """Watch MLflow's connections; yields the controller to be used instead."""
        send = requests.Session.request

        def request(session: requests.Session, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
            reads = method.upper() == "GET" or url.partition("?")[0].endswith(("/search", "/get-history-bulk"))
            if reads or threading.current_thread().name == "progress":
                return send(session, method, url, *args, **kwargs)
            path = url.partition("?")[0].rpartition("/mlflow")[2] or url
            return self.write(f"{method} {path}", lambda: send(session, method, url, *args, **kwargs))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(requests.Session, "request", request)
            yield _Watched(controller, self)


class _Watched:
    def __init__(self, controller: Any, fuse: Fuse) -> None:
        self._controller, self._fuse = controller, fuse

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._controller, name)
        if name not in CHANGES:
            return method

        def change(*args: Any, **kwargs: Any) -> Any:
            try:
                return self._fuse.write(name, lambda: method(*args, **kwargs))
            except requests.ConnectionError as error:  # a real controller says it so
                raise Unavailable(str(error)) from error

        return change


def stopped(
    make: Callable[[], Any],
    act: Callable[[Any, Any], object],
    fuse: Callable[[int, Any], Fuse],
    numbers: range = range(1000),
) -> Iterator[tuple[int, Fuse, Any, Exception | None]]:
    """The action on ever new models, each time with a fuse at another of its writes, as long as there are any.

    Yields the number, the fuse, the model, and the error that the action ended with (ours or MLflow's), None after a
    success or a kill.
    """
    for at in numbers:
        model = make()
        lit = fuse(at, model)
        error: Exception | None = None
        with lit.watching(model.fake) as controller:
            try:
                act(model, controller)
            except (SlipstreamError, MlflowException) as raised:
                error = raised
            except Killed:
                pass
        if len(lit.writes) <= at:
            assert at > 3, "nothing was watched"
            return
        yield at, lit, model, error


EVERY = pytest.param(range(1000), marks=pytest.mark.slow, id="each write")


def some(first: int) -> Any:
    """Every third write: what the quick tests look at."""
    return pytest.param(range(first, 1000, 3), id="every third write")
