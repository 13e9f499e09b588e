"""The layers of a TensorRT engine: which layers of the ONNX were fused into which kernel, in which precision.

TensorRT's engine inspector reports them, but needs a loaded engine, and so a GPU. Without one, the messages of TensorRT
for RTX's builder contain the same table; both are read here into rows of one kind.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from slipstream.contract import Document, Json
from slipstream.engines.base import LAYERS
from slipstream.engines.tensorrt_api import MESSAGES, Said, trt

LINE = re.compile(
    r"Name: (?P<Name>.*?), LayerType: (?P<LayerType>.*?), Inputs: (?P<Inputs>\[.*?\]), "
    r"(?:Constants: (?P<Constants>\[.*\]), )?Outputs: (?P<Outputs>\[.*\]), "
    r"TacticName: (?P<TacticName>.*?), StreamId: \d+, Metadata: (?P<Metadata>.*)"
)
"""One layer in the builder's messages (TensorRT for RTX 1.7.1)."""
DATATYPE = re.compile(r"Datatype: (\w+)")
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
PRECISIONS = {
    **{"Float": "FP32", "Half": "FP16", "BFloat16": "BF16", "Int8": "INT8", "Int4": "INT4", "FP8": "FP8"},
    **{"Int32": "INT32", "Int64": "INT64", "Bool": "BOOL", "UInt8": "UINT8"},
}
"""Usual name of a precision by TensorRT's."""
WORD = re.compile(r"\b(FP32|FP16|BF16|INT8|INT4|FP8|INT32|INT64|BOOL|UINT8)\b", re.IGNORECASE)
"""Precision in the inspector's `Format/Datatype` of TensorRT 10: `Row major linear FP16 format`."""


class Layer(Document):
    """One kernel of an engine."""

    name: str
    type: str
    """TensorRT's name of its type."""
    onnx: tuple[str, ...]
    """Nodes of the candidate's ONNX that were fused into it."""
    inputs: tuple[str, ...]
    """Precision of each input."""
    weights: tuple[str, ...]
    """Precision of each constant."""
    outputs: tuple[str, ...]
    """Precision of each output."""
    tactic: str
    """Kernel, if TensorRT names it."""

    @property
    def precision(self) -> str:
        """The precision it computes in, as far as its tensors show: the narrowest of its inputs and weights."""
        order = ("INT4", "FP8", "INT8", "FP16", "BF16", "FP32")
        precisions = {*self.inputs, *self.weights} or set(self.outputs)
        return next((p for p in order if p in precisions), "")


def from_builder(said: Said) -> list[Layer]:
    """Return the layers in the builder's messages; none if it does not report them (TensorRT 10 and 11)."""
    tables = [text for _, text in said.lines if text.startswith("Layers:")]
    if not tables:
        return []
    return [_from_line(match.groupdict("")) for line in tables[-1].splitlines() if (match := LINE.match(line))]


def from_inspector(engine: trt.ICudaEngine) -> list[Layer]:
    """Return the layers of a loaded engine."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return from_json(text)


def from_json(text: str) -> list[Layer]:
    """Return the layers in the inspector's JSON, with `Datatype` (11, RTX) or `Format/Datatype` (10) of each tensor."""
    # An engine built without details has only names.
    return [_from_json(layer) for layer in json.loads(text)["Layers"] if isinstance(layer, dict)]


def write(folder: Path, plan: bytes, said: Said, *, loadable: bool) -> list[Layer]:
    """Write `layers.json` of an engine that was just built, from the inspector if the engine can be loaded."""
    layers = from_builder(said)
    if loadable:
        engine = trt.Runtime(MESSAGES).deserialize_cuda_engine(plan)
        layers = from_inspector(engine) if engine is not None else layers
    (folder / LAYERS).write_text(json.dumps(table(layers), indent=1))
    return layers


def table(layers: Iterable[Layer]) -> dict[str, list[str] | list[list[str]]]:
    """Return columns and rows in the form of MLflow's tables."""
    rows = [
        [layer.name, layer.type, layer.precision, ", ".join(layer.onnx), _joined(layer.inputs), _joined(layer.weights),
         _joined(layer.outputs), layer.tactic]
        for layer in layers
    ]  # fmt: skip
    return {"columns": ["layer", "type", "precision", "onnx", "inputs", "weights", "outputs", "tactic"], "data": rows}


def figures(layers: Iterable[Layer]) -> dict[str, float]:
    """Return `layers`, and how many of them compute in each precision: `layers_int8` and the like."""
    counted = [layer.precision.lower() for layer in layers]
    by_precision = {f"layers_{p}": float(counted.count(p)) for p in sorted(set(counted)) if p}
    return {"layers": float(len(counted)), **by_precision}


def _joined(precisions: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(precisions))


def _from_line(fields: dict[str, str]) -> Layer:
    def precisions(part: str) -> tuple[str, ...]:
        return tuple(PRECISIONS.get(word, word) for word in DATATYPE.findall(fields[part]))

    return Layer(
        name=fields["Name"],
        type=fields["LayerType"],
        onnx=tuple(ONNX_LAYER.findall(fields["Metadata"])),
        inputs=precisions("Inputs"),
        weights=precisions("Constants"),
        outputs=precisions("Outputs"),
        tactic=fields["TacticName"],
    )


def _from_json(layer: Json) -> Layer:
    def precisions(part: str) -> tuple[str, ...]:
        return tuple(_precision(tensor) for tensor in layer.get(part, ()) if isinstance(tensor, dict))

    return Layer(
        name=str(layer.get("Name", "")),
        type=str(layer.get("LayerType", "")),
        onnx=tuple(ONNX_LAYER.findall(str(layer.get("Metadata", "")))),
        inputs=precisions("Inputs"),
        weights=precisions("Constants"),
        outputs=precisions("Outputs"),
        tactic=str(layer.get("TacticName", "")),
    )


def _precision(tensor: Json) -> str:
    word = tensor.get("Datatype") or tensor.get("DataType")
    if word is not None:
        return PRECISIONS.get(word, str(word))
    match = WORD.search(str(tensor.get("Format/Datatype", "")))
    return match[1].upper() if match else ""
