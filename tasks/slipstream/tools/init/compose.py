"""Writes the spec and the data function: commented text, since a person continues from here."""

import json
from dataclasses import dataclass

from slipstream.plugins import ENGINES
from slipstream.tools.init.facts import Facts
from slipstream.tools.init.machine import Machine

LISTED = 6
"""Maximum kinds of layers that a comment lists."""


@dataclass(frozen=True)
class Plan:
    """Everything that the spec is written from."""

    name: str
    model: str
    """MODEL as given."""
    registry: str
    facts: Facts
    machine: Machine
    data: str
    """module:function."""
    data_known: bool
    """Whether the user named it."""
    size_bytes: int | None = None
    file: str | None = None
    architecture: str | None = None
    notes: tuple[str, ...] = ()
    data_files: tuple[str, str] | None = None
    """Training and test split as files, instead of the function."""

    @property
    def metric(self) -> tuple[str, str]:
        """The metric, and the reason for the guess."""
        shape = self.facts.output_shape
        if shape is None:
            return "top1", "the shape of the answers is not known without data"
        if len(shape) == 1:
            return "top1", f"the model answers {shape[0]} numbers, taken to be scores of classes"
        if len(shape) == 3:
            return "miou", f"the model answers {described(shape)} numbers, taken to be scores of classes for pixels"
        return "map", f"the model answers {described(shape)} numbers, taken to be boxes with scores"

    @property
    def unknown(self) -> tuple[str, ...]:
        """What could not be determined, in sentences for a person."""
        metric, why = self.metric
        sentences = [
            f"metric: {metric} is a guess: {why}",
            "max_drop: how much of the metric you may lose, in percentage points, and how fast is fast enough",
        ]
        if not self.data_known:
            sentences.insert(0, f"data: {self.data} reads two files that you must write; see the comments there")
        return (*sentences, *self.facts.notes, *self.notes)


def described(shape: tuple[int, ...]) -> str:
    """Return a shape in words: 1×28×28; `any` where it varies."""
    return "×".join("any" if size == -1 else str(size) for size in shape) or "one"


def about(plan: Plan) -> list[str]:
    """Return a sentence each on the model and the machine."""
    facts = plan.facts
    size = f"{plan.size_bytes / 1e6:,.1f} MB, " if plan.size_bytes is not None else ""
    kinds = sorted(facts.layers.items(), key=lambda entry: (-entry[1], entry[0]))
    layers = ", ".join(f"{count} {kind}" for kind, count in kinds[:LISTED]) + (", …" if len(kinds) > LISTED else "")
    takes = "shapes not known without data"
    if facts.input_shape is not None and facts.output_shape is not None:
        takes = f"{described(facts.input_shape)} {facts.input_dtype} → {described(facts.output_shape)}"
    kind = "a transformer" if facts.transformer else "no transformer"
    quantized = ", quantized already" if facts.quantized else ""
    gpus = f"GPU: {', '.join(plan.machine.gpus)}" if plan.machine.gpus else "no NVIDIA GPU"
    return [
        f"Model: {facts.framework}, {takes}; {facts.parameters:,} weights, {size}{kind}{quantized} ({layers}).",
        f"Machine: {plan.machine.sentence}; {gpus}.",
    ]


def spec_text(plan: Plan) -> str:
    """Return the spec as YAML."""
    sections = (_head(plan), _model(plan), _objective(plan), _recipes(plan), _targets(plan), _rollout())
    return "\n".join(line for section in sections for line in section) + "\n"


def _head(plan: Plan) -> list[str]:
    return [
        f"# Written by `slipstream init {plan.model}`: a start, to be read and changed. All keys: docs/spec.md.",
        *(f"# {line}" for line in about(plan)),
        "# What could not be known is marked CHECK:",
        *(f"#   {line}" for line in plan.unknown),
        f"name: {plan.name}",
    ]


def _model(plan: Plan) -> list[str]:
    lines = ["model:", f"  registry: {plan.registry}     # moving this alias starts a run"]
    lines.append(f"  framework: {plan.facts.framework}")
    if plan.architecture is not None:
        lines.append(f"  architecture: {plan.architecture}     # builds the network; weights are loaded into it")
    if plan.file is not None:
        lines.append(f"  file: {plan.file}     # the first run registers it, and sets the alias")
    if plan.data_files is not None:
        train, test = plan.data_files
        return [*lines, f"data: {{train: {json.dumps(train)}, test: {json.dumps(test)}}}     # `inputs` and `labels`"]
    check = "" if plan.data_known else "     # CHECK: write the files that it reads, or read yours there"
    return [*lines, f"data: {plan.data}{check}"]


def _objective(plan: Plan) -> list[str]:
    return [
        "objective:",
        f"  metric: {plan.metric[0]}     # CHECK: top1, top5, f1, map, miou, or a function of yours as module:function",
        "  max_drop: 1.0     # CHECK: percentage points that an engine may surely lose against the model as it came in",
        "  confidence: 0.95",
        "  # latency_p99_ms: 5     # an upper limit, when there is one",
        "  prefer: latency     # which of the engines that pass is released: or throughput, size, accuracy",
    ]


def _recipes(plan: Plan) -> list[str]:
    lines = ["recipes:     # each is built for each target; the unchanged model is always measured beside them"]
    if plan.facts.quantized:
        lines.append("  simplified: [simplify]     # only a cleaner graph, since the weights are quantized already")
        return lines
    first = "[simplify, quantize]" if plan.facts.framework == "onnx" else "[quantize]"
    lines.append(f"  int8: {first}")
    if plan.facts.framework == "torch":
        lines += [
            "  pruned-int8: [prune, quantize]     # removes channels and trains again, which takes longer",
            "  # distilled-int8: [distill, quantize]     # needs a `distill:` section with a smaller network",
        ]
    if plan.facts.framework == "keras":
        lines.append("  # pruned-int8: [prune, quantize]     # needs training; see `prune:` in docs/spec.md")
    advice = "attention may lose more than convolutions do; look at the report first" if plan.facts.transformer else ""
    lines.append("quantize: {scheme: int8, samples: 300}" + (f"     # {advice}" if advice else ""))
    return lines


def _targets(plan: Plan) -> list[str]:
    threads, facts = plan.machine.threads, plan.facts
    lengths = ", lengths: [16, 32, 64, 128]" if facts.reads_tokens and facts.input_shape == (-1,) else ""
    lines = [
        f"targets:     # {plan.machine.cores} cores here; threads are those of one inference",
        f"  server: {{engine: openvino, device: CPU, threads: {threads}{lengths}}}",
        f"  portable: {{engine: onnxruntime, threads: {threads}{lengths}}}",
    ]
    if plan.machine.bf16:
        lines.append(f"  bf16: {{engine: openvino, device: CPU, threads: {threads}, precision: bf16{lengths}}}")
    if facts.framework == "keras" and "litert" in ENGINES:
        lines.append(f"  edge: {{engine: litert, threads: {threads}{lengths}}}")
    if facts.framework == "torch":
        lines.append("  # torch: {engine: torch}     # torch.compile, for comparison: needs a C++ compiler and minutes")
    if plan.machine.gpus:
        lines.append("  # gpu: {engine: tensorrt, …}     # docs/engines.md has the engine and its options")
    return lines


def _rollout() -> list[str]:
    return [
        "small_scale_test: {shadow: 2500, share: 5%, requests: 2000}     # beside the release, before it gets traffic",
        "rollout: {steps: [25, 50, 100], approval: true}     # a person says yes first; false once you trust it",
        '# schedule: "@weekly"',
    ]


def data_text(plan: Plan, stem: str) -> str:
    """Return the data function's file. It invents nothing: without the two files it says what to write."""
    facts = plan.facts
    shape = "the shape that the model takes" if facts.input_shape is None else f"(N, {_tuple(facts.input_shape)})"
    labels = {
        "top1": "(N,) int64: the class of each sample",
        "miou": "(N, H, W) int64: the class of each pixel",
        "map": "(N, M, 5) float32: boxes with classes; slipstream/measure/metrics/detection.py says how",
    }[plan.metric[0]]
    return f'''"""The data of {plan.name}: written by `slipstream init` as a start; change how the splits are read.

A split has `inputs`, {shape} {facts.input_dtype or "in its dtype"},
prepared exactly as the model was trained (scaled, ordered, tokenized); and `labels`,
{labels}.
Engines are calibrated on samples of `train`, and judged on `test` alone: real samples that the model has not seen,
a thousand or more, since fewer leave the gates undecided.
"""

from pathlib import Path

import numpy as np

from slipstream import Data, DataError, Split

FOLDER = Path(__file__).parent


def data():
    """Both splits; `classes` would name the classes in reports."""
    return Data(train=_split("train"), test=_split("test"))


def _split(name):
    path = FOLDER / f"{stem}-{{name}}.npz"
    if not path.exists():
        raise DataError(f"{{path}}: not there yet; write it by numpy.savez(path, inputs=..., labels=...)")
    with np.load(path, allow_pickle=False) as arrays:
        return Split(arrays["inputs"], arrays["labels"])
'''


def _tuple(shape: tuple[int, ...]) -> str:
    return ", ".join("any" if size == -1 else str(size) for size in shape)
