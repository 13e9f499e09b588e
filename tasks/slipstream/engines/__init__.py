"""Engines: what turns a candidate into bytes that are deployed. One module each, found by its name here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineInfo:
    """What the rest knows of an engine without loading it."""

    module: str
    environment: str | None = None
    """Environment (containers/NAME) that builds and validates it; None where the framework's own has its libraries."""
    server: str | None = "serve"
    """Environment of its model servers; None for an engine that is measured for comparison and never released."""


ENGINES: dict[str, EngineInfo] = {
    "onnxruntime": EngineInfo("slipstream.engines.onnxruntime"),
    "openvino": EngineInfo("slipstream.engines.openvino"),
}
"""Spec name → what is known of it. Nothing is imported until it is used."""
