"""An engine with a fault: ONNX Runtime, with an Abs where a tensor was made by something else.

A test puts it into the table of engines under a name, with the tensor whose maker is at fault in BROKEN.
"""

from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from slipstream.engines.base import Runner
from slipstream.engines.onnxruntime import OnnxRuntime
from slipstream.frameworks.base import ONNX
from slipstream.spec import Target

BROKEN: set[str] = set()


class BrokenEngine(OnnxRuntime):
    """Builds what it is given, but with another operator where BROKEN says."""

    def build(self, candidate: Path, target: Target, folder: Path) -> Any:
        model = onnx.load(candidate / ONNX)
        for node in model.graph.node:
            if BROKEN & set(node.output):
                node.CopyFrom(helper.make_node("Abs", node.input, node.output, node.name))
        wrong = folder / "wrong"
        wrong.mkdir()
        onnx.save(model, wrong / ONNX)
        super().build(wrong, target, folder)

    def load(self, folder: Path, target: Target) -> Runner:
        return super().load(folder, target.model_copy(update={"engine": "onnxruntime"}))


ENGINE = BrokenEngine()
