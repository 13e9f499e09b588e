"""Traffic: deployment of releases, the traffic split, and how stages 2 and 3 watch it."""

import importlib
import os

from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.traffic.base import TrafficController

CONTROLLERS: dict[str, str] = {"envoy": "slipstream.traffic.envoy", "kserve": "slipstream.traffic.kserve"}
"""Module with a function `controller(home)`, by setting. Imported only on use."""


def controller(home: Home) -> TrafficController:
    """Return the controller that SLIPSTREAM_TRAFFIC names; by default, Envoy on this machine."""
    name = os.environ.get("SLIPSTREAM_TRAFFIC", "envoy")
    if name not in CONTROLLERS:
        raise InputError(f"SLIPSTREAM_TRAFFIC={name}: unknown; known: {', '.join(CONTROLLERS)}")
    instance: TrafficController = importlib.import_module(CONTROLLERS[name]).controller(home)
    return instance
