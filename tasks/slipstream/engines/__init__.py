"""Engines: what turns a candidate into bytes that are deployed. One module each, found by its name here."""

ENGINES: dict[str, str] = {
    "onnxruntime": "slipstream.engines.onnxruntime",
    "openvino": "slipstream.engines.openvino",
}
"""Spec name → module. Nothing is imported until it is used."""
