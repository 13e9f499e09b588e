"""A place to run steps that a test makes."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from slipstream.plugins import RUNTIMES, RuntimeInfo


def use_runtime(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
    """Let steps run in what `make` returns."""
    module = ModuleType("recorded_runtime")
    module.runtime = make  # type: ignore[attr-defined] # it is made here
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(RUNTIMES, "recorded", RuntimeInfo(module.__name__))
    monkeypatch.setenv("SLIPSTREAM_RUNTIME", "recorded")
