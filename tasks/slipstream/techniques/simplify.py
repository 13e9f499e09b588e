"""simplify: the candidate's ONNX with fewer nodes and the same answers, by onnxslim, one pass after the other.

Engines also optimize graphs, each in its own way; folding here serves all of them, and is visible. Metrics: `nodes` and
`bytes` before, after, and after each pass; `passes.json` has them as a table.
"""

import json
import logging
from dataclasses import dataclass

import onnx

from slipstream import digests
from slipstream.contract import Json, StepInput, StepOutput
from slipstream.contract.arrays import Array
from slipstream.errors import ModelError
from slipstream.frameworks.base import ONNX
from slipstream.onnx import graph as onnx_graph
from slipstream.onnx.session import Session, require_same
from slipstream.runner.context import Context
from slipstream.spec import Spec
from slipstream.techniques import candidates

log = logging.getLogger(__name__)

SAMPLES = 16
"""Samples of the training split that must be answered as before, together and one by one."""
PASSES = (
    "constant_folding",
    "dead_node_elimination",
    "subexpression_elimination",
    "weight_tying",
    "graph_fusion",
)
"""onnxslim's names, in the order in which one leaves work for the next."""
ROUNDS = 3
"""Maximum repetitions of all passes while they still change the graph."""


@dataclass(frozen=True)
class Row:
    """Effect of a pass on the graph."""

    after: str
    nodes: int
    size_bytes: int

    @classmethod
    def of(cls, after: str, model: onnx.ModelProto) -> "Row":
        return cls(after, sum(1 for _ in onnx_graph.nodes(model)), model.ByteSize())


def settings(spec: Spec, inputs: StepInput) -> Json:
    """Return what determines the result, in addition to the candidate and the data."""
    return {"versions": digests.versions("onnx", "onnxruntime", "onnxslim"), "passes": PASSES}


def run(context: Context) -> StepOutput:
    """Simplify the recipe's latest candidate."""
    source = candidates.source_of(context)
    assert source.artifact is not None
    candidate = context.fetch(source)
    before = onnx_graph.read(candidate / ONNX)
    after, rows = simplify(before)
    require_same_answers(before, after, context.data.train.inputs[:SAMPLES])
    folder = candidates.write_onnx(context, candidate, after)
    metrics = _metrics(rows)
    context.run.metrics(metrics)
    _log_table(context, rows)
    log.info("simplified: %d nodes, %d before", rows[-1].nodes, rows[0].nodes)
    name = f"{context.cell.recipe}-simplified"
    artifact = candidates.log(context, folder, name, parents=[source.artifact.model_id])
    return context.output(artifact=artifact, metrics=metrics)


def simplify(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[Row]]:
    """Return the simplified model, and the effect of each pass; the first row is the original model. Raise
    ModelError."""
    model = _bare(model)
    rows = [Row.of("before", model)]
    for number in range(1, ROUNDS + 1):
        start = len(rows)
        for name in PASSES:
            model = _bare(_passed(model, name))
            rows.append(Row.of(name if number == 1 else f"{name}_{number}", model))
        if all(
            (row.nodes, row.size_bytes) == (rows[start - 1].nodes, rows[start - 1].size_bytes) for row in rows[start:]
        ):
            del rows[start:]  # nothing was left to do
            break
    try:
        onnx_graph.require_standard(model)
        onnx_graph.infer_shapes(model)
    except ModelError as error:
        raise ModelError(f"the simplified model is not valid any more: {error}; leave `simplify` out") from error
    return model, rows


def require_same_answers(before: onnx.ModelProto, after: onnx.ModelProto, samples: Array) -> None:
    """Raise ModelError unless both answer the samples (N, …) the same, together and one by one."""
    old, new = Session(before), Session(after)
    for size in (len(samples), 1):
        what = f"the simplified model, in batches of {size}"
        require_same(old.answers(samples, size), new.answers(samples, size), what)


def _passed(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return the model after one of onnxslim's passes."""
    import onnxslim

    try:
        return onnxslim.slim(onnx_graph.copy_of(model), skip_optimizations=[p for p in PASSES if p != name])
    except Exception as error:  # onnxslim's, sympy's and protobuf's errors share no root but Exception
        raise ModelError(
            f"onnxslim's {name} cannot be done: {type(error).__name__}: {error}; leave `simplify` out"
        ) from error


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model without the shapes that each pass adds for every tensor: they can be inferred again."""
    model = onnx_graph.copy_of(model)
    del model.graph.value_info[:]
    return model


def _metrics(rows: list[Row]) -> dict[str, float]:
    by_pass = {f"{what}_{row.after}": float(value) for row in rows for what, value in _figures(row)}
    return by_pass | {f"{what}_after": float(value) for what, value in _figures(rows[-1])}


def _figures(row: Row) -> tuple[tuple[str, int], ...]:
    return ("nodes", row.nodes), ("bytes", row.size_bytes)


def _log_table(context: Context, rows: list[Row]) -> None:
    """Log the rows in the layout of MLflow's tables."""
    path = context.workdir / "passes.json"
    data = [[row.after, row.nodes, row.size_bytes] for row in rows]
    path.write_text(json.dumps({"columns": ["pass", "nodes", "bytes"], "data": data}))
    context.run.artifact(path)
