"""Traffic: who deploys releases, who splits the traffic, and how stages 2 and 3 watch it."""

import importlib
import os

from slipstream.errors import InputError
from slipstream.home import Home
from slipstream.traffic.base import TrafficController

CONTROLLERS: dict[str, str] = {"envoy": "slipstream.traffic.envoy", "kserve": "slipstream.traffic.kserve"}
"""Setting → module with a function `controller(home)`. Nothing is imported before it is asked for."""


def controller(home: Home) -> TrafficController:
    """The controller that SLIPSTREAM_TRAFFIC names; Envoy on this machine when it names none."""
    name = os.environ.get("SLIPSTREAM_TRAFFIC", "envoy")
    if name not in CONTROLLERS:
        raise InputError(f"SLIPSTREAM_TRAFFIC={name}: unknown; known: {', '.join(CONTROLLERS)}")
    instance: TrafficController = importlib.import_module(CONTROLLERS[name]).controller(home)
    return instance
