"""Engines: what turns a candidate into bytes that are deployed. One module each, found by its name here."""

from dataclasses import dataclass

SERVE = "serve"
"""Environment of the model servers of engines that have none of their own."""


@dataclass(frozen=True)
class EngineInfo:
    """What the rest knows of an engine without loading it."""

    module: str
    environment: str | None = None
    """Environment (containers/NAME) that builds and validates it; None where the framework's own has its libraries."""
    server: str | None = SERVE
    """Environment of its model servers; None for an engine that is measured for comparison and never released."""
    frameworks: tuple[str, ...] = ()
    """Frameworks whose models it builds; none named is all of them. A spec that asks for another is refused."""
    schemes: tuple[str, ...] = ("int8",)
    """Values of `quantize.scheme` that it computes in, or at least keeps small; a spec that asks for another is
    refused. None at all is an engine that takes no quantized model: recipes that quantize leave its targets out."""


ENGINES: dict[str, EngineInfo] = {
    "litert": EngineInfo(
        "slipstream.engines.litert",
        frameworks=("keras",),
        schemes=("int8", "int8-dynamic", "int8-weights", "int4-weights"),
    ),
    "onnxruntime": EngineInfo(
        "slipstream.engines.onnxruntime", schemes=("int8", "int8-dynamic", "int8-weights", "int4-weights")
    ),
    "openvino": EngineInfo("slipstream.engines.openvino", schemes=("int8", "int8-weights", "int4-weights")),
    "tensorrt": EngineInfo(
        "slipstream.engines.tensorrt",
        environment="tensorrt",
        server="tensorrt",
        schemes=("int8", "int8-weights", "int4-weights"),
    ),
    "torch": EngineInfo("slipstream.engines.torch", server=None, frameworks=("torch",), schemes=()),
}
"""Spec name → what is known of it. Nothing is imported until it is used."""
