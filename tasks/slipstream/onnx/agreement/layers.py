"""Which layer diverges first, if an engine does not answer like the ONNX that it was built from.

The ONNX is cut at a tensor, the same engine is built from the remaining part, and its answer is compared with that
tensor's value in the reference. Cutting keeps everything that the engine fuses before the cut; exposing every tensor at
once would prevent fusion, and hide the fault. A bisection needs about log₂(nodes) builds, and is done only after a
failure.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from slipstream.contract.arrays import Array, FloatArray
from slipstream.engines.base import engine_for
from slipstream.errors import EngineError, ModelError
from slipstream.frameworks.base import INPUT, MANIFEST, ONNX, OUTPUT, read_manifest
from slipstream.onnx.agreement.bounds import Bound, explain_mismatch
from slipstream.onnx.agreement.reference import tensors
from slipstream.spec import Target

if TYPE_CHECKING:  # imported only after a failure
    import onnx

SAMPLES = 8
"""Number of samples on which layers are compared: the values of all tensors are held at once."""


def first_departure(candidate: Path, target: Target, samples: Array, bound: Bound) -> str:
    """Return a sentence that names the first node whose inputs agree and whose output does not.

    `samples` are (N, …). The sentence says so if the node cannot be determined: the engine is not built from ONNX, or
    diverges on none of the first samples.
    """
    try:
        return _Search.of(candidate, target, np.ascontiguousarray(samples[:SAMPLES]), bound).run()
    except (EngineError, ModelError) as error:
        return f"where it departs cannot be told: {error}"


@dataclass
class _Search:
    """One search, which remembers its comparisons."""

    model: "onnx.ModelProto"
    candidate: Path
    target: Target
    samples: Array
    bound: Bound
    values: Mapping[str, FloatArray]
    """The reference's tensors in topological order."""
    found: dict[str, str | None] = field(default_factory=dict)
    """Differences by tensor; None if it agrees."""

    @classmethod
    def of(cls, candidate: Path, target: Target, samples: Array, bound: Bound) -> "_Search":
        import onnx

        model = onnx.load(candidate / ONNX)
        values = tensors(candidate / ONNX, samples)
        declared = {info.name for info in (*model.graph.value_info, *model.graph.output)}
        model.graph.value_info.extend(  # the declared type of a cut graph's output
            onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), ["batch", *[None] * (value.ndim - 1)]
            )
            for name, value in values.items()
            if name not in declared
        )
        return cls(model, candidate, target, samples, bound, values)

    def run(self) -> str:
        if OUTPUT not in self.values or self._mismatch(OUTPUT) is None:
            return f"where it departs cannot be told from the first {len(self.samples)} samples"
        makers = {name: node for node in self.model.graph.node for name in node.output}
        departing = OUTPUT
        while True:
            departing = self._first_of(self._before(departing, makers), departing)
            node = makers[departing]
            earlier = [n for n in node.input if n in self.values and self._mismatch(n) is not None]
            if not earlier:
                label = f" {node.name!r}" if node.name else ""
                return f"the first to depart is the {node.op_type}{label} (tensor {departing!r}): it " + str(
                    self.found[departing]
                )
            departing = earlier[0]

    def _first_of(self, before: Sequence[str], departing: str) -> str:
        """Return a tensor that diverges while the one before it in the order does not, by bisection."""
        agreeing, bad = -1, len(before)
        while bad - agreeing > 1:
            middle = (agreeing + bad) // 2
            if self._mismatch(before[middle]) is None:
                agreeing = middle
            else:
                bad = middle
        return before[bad] if bad < len(before) else departing

    def _before(self, tensor: str, makers: Mapping[str, "onnx.NodeProto"]) -> list[str]:
        """Return the tensors that this one is computed from, in topological order."""
        ancestors, todo = set(), [tensor]
        while todo:
            node = makers.get(todo.pop())
            for name in node.input if node is not None else ():
                if name and name not in ancestors:
                    ancestors.add(name)
                    todo.append(name)
        return [name for name in self.values if name in ancestors]

    def _mismatch(self, tensor: str) -> str | None:
        if tensor not in self.found:
            bound = self.bound if tensor == OUTPUT else replace(self.bound, labels=0.0)  # others have no labels
            self.found[tensor] = explain_mismatch(self.values[tensor], self._answer(tensor), bound)
        return self.found[tensor]

    def _answer(self, tensor: str) -> Array:
        """Return the engine's value of a tensor (N, …)."""
        engine = engine_for(self.target.engine)
        with tempfile.TemporaryDirectory() as folder:
            cut, built = Path(folder) / "candidate", Path(folder) / "engine"
            cut.mkdir()
            built.mkdir()
            self._write_cut(tensor, cut)
            engine.build(cut, self.target, built)
            return engine.load(built, self.target).run(self.samples)

    def _write_cut(self, tensor: str, folder: Path) -> None:
        """Write a candidate whose ONNX ends at a tensor, as float32."""
        import onnx
        from onnx.utils import Extractor

        model = Extractor(self.model).extract_model([INPUT], [tensor])
        if tensor != OUTPUT:
            model.graph.node.append(onnx.helper.make_node("Cast", [tensor], [OUTPUT], to=onnx.TensorProto.FLOAT))
            model.graph.output[0].name = OUTPUT
            model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        onnx.save(model, folder / ONNX)
        manifest = read_manifest(self.candidate).model_copy(
            update={"architecture": None, "output_shape": self.values[tensor].shape[1:]}
        )
        (folder / MANIFEST).write_text(manifest.model_dump_json())
