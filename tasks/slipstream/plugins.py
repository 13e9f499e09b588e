"""The tables: every engine, framework, scheme, metric and step by name, and what the rest needs to know of it.

Plain data that imports nothing. The spec's vocabulary, its schema, the docs, `check`, the DAG and the identities derive
from it what exists; a module is imported only when its entry is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BASELINE = "baseline"
"""Name of the implicit recipe with no techniques: the reference for every gate."""

# Engines

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


# Frameworks


@dataclass(frozen=True)
class FrameworkInfo:
    """What the rest knows of a framework without loading it."""

    module: str
    environment: str
    """Environment (containers/NAME) of the steps that work on its models."""
    techniques: tuple[str, ...]
    """Techniques that it has; a spec that asks for another is refused."""
    distributions: tuple[str, ...]
    """PyPI distributions whose versions belong to the identity of what it makes."""
    trains: bool = True
    """Whether its models can be trained; if not, its module is a Framework, but no Trainer."""
    keeps: tuple[str, ...] = ()
    """Files and folders of a candidate that stay beside its quantized ONNX form, with the calibration samples: for
    engines that convert from them."""
    prune_methods: tuple[str, ...] = ("channels",)
    """Values of `prune.method` that it has."""
    quantization_aware: bool = False
    """Whether it trains with rounded weights (`quantize.epochs`)."""
    distributed: bool = False
    """Whether several processes can train together (`training.workers`)."""


FRAMEWORKS: dict[str, FrameworkInfo] = {
    "keras": FrameworkInfo(
        "slipstream.frameworks.keras",
        "tensorflow",
        ("distill", "prune", "cluster", "quantize"),
        ("tensorflow", "tf-keras", "tensorflow-model-optimization", "tf2onnx", "onnx", "onnxruntime", "numpy"),
        keeps=("saved_model",),
        prune_methods=("magnitude", "2:4"),
        quantization_aware=True,
    ),
    "onnx": FrameworkInfo(
        "slipstream.frameworks.onnx",
        "torch",
        ("simplify", "quantize"),
        ("onnx", "onnxruntime", "numpy"),
        trains=False,
    ),
    "torch": FrameworkInfo(
        "slipstream.frameworks.torch",
        "torch",
        ("distill", "prune", "simplify", "quantize"),
        ("torch", "torch-pruning", "safetensors", "onnx", "onnxruntime", "numpy"),
        distributed=True,
    ),
}
"""Spec name → what is known of it."""


# Quantization schemes

SCHEMES = {
    "int8": "slipstream.onnx.quantize.static",
    "int8-dynamic": "slipstream.onnx.quantize.dynamic",
    "int8-weights": "slipstream.onnx.quantize.weights",
    "int4-weights": "slipstream.onnx.quantize.weights",
}
"""`quantize.scheme` → module. Nothing is imported until it is used."""


# Metrics


@dataclass(frozen=True)
class MetricInfo:
    """What the rest knows of a metric without loading it."""

    module: str
    attribute: str
    """Name of the metric in its module."""


METRICS: dict[str, MetricInfo] = {
    "top1": MetricInfo("slipstream.measure.metrics.classification", "TOP1"),
    "top5": MetricInfo("slipstream.measure.metrics.classification", "TOP5"),
    "f1": MetricInfo("slipstream.measure.metrics.classification", "F1"),
    "map": MetricInfo("slipstream.measure.metrics.detection", "MAP"),
    "miou": MetricInfo("slipstream.measure.metrics.segmentation", "MIOU"),
}
"""Spec name → where the metric is. Any other name is the user's own, `module:function` (metrics/user.py)."""


def short_name(metric: str) -> str:
    """A metric's name in tables and charts: the spec's, or the user's function without its module."""
    return metric.rpartition(":")[2]


# Steps

FRAMEWORK = "framework"
"""Placeholder for the environment of the spec's framework, or of an engine that has its own."""

TRAINING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP's threads otherwise spin while they wait for one another: with a neighbour on one of two cores an epoch of
the example took 460 s instead of 66 s. Measuring steps keep the default, which is faster on a quiet machine."""


CANDIDATE, BASELINE_ENGINE = "(candidate)", "(baseline's engine)"
"""In `StepInfo.uses`: the recipe's latest model before the step, and the baseline's engine on the same target."""

Stage = Literal["optimize", "accuracy_validation", "small_scale_test", "full_rollout", "report"]


@dataclass(frozen=True)
class StepInfo:
    """A row of the flow: where a step stands in it, what it needs, where it runs and what its identity covers."""

    environment: str
    """Environment (containers/NAME) that the step needs."""
    stage: Stage | None
    """Stage that it belongs to; None for a step outside the flow."""
    per: Literal["run", "recipe", "cell"] = "run"
    """What it runs once for. A technique runs for those recipes that name it."""
    uses: tuple[str, ...] | None = None
    """Steps whose outputs it is given, those of its own cell where they have one; None is all before it."""
    sources: tuple[str, ...] = ()
    """Parts of this package, beside its own module, that decide its result. What `data` gives counts by its digests."""
    cached: bool = True
    """Whether an equal identity means an equal result; false for steps that act on the world."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables to set, unless they are set, before the step loads its libraries."""
    gates: bool = False
    """Whether its verdicts decide if anything is released."""
    retried: bool = True
    """Whether it is tried again where exit codes tell nothing: nobody may ask a gate until it says yes."""
    moves_traffic: bool = False
    """Whether it deploys releases and splits their traffic: one at a time, with the rights to do so."""
    measures: bool = False
    """Whether it measures time: it gets the whole machine, and others are to keep quiet."""

    @property
    def trains(self) -> bool:
        """Whether the step trains, and so may do so in several processes."""
        return self.variables is TRAINING


DATA = ("data/splits.py", "data/tokens.py")
ONNX = ("onnx/graph.py", "onnx/session.py", "onnx/agreement")
MAKES_CANDIDATES = ("frameworks", *ONNX, "steps/candidates.py", *DATA)


def _technique(*sources: str, uses: str = CANDIDATE, trains: bool = False) -> StepInfo:
    variables = TRAINING if trains else {}
    return StepInfo(
        FRAMEWORK, "optimize", "recipe", ("check", uses), (*MAKES_CANDIDATES, *sources), variables=variables
    )


STEPS: dict[str, StepInfo] = {
    "check": StepInfo(FRAMEWORK, "optimize", uses=(), cached=False, retried=False),
    "retrain": StepInfo(FRAMEWORK, "optimize", uses=("check",), sources=MAKES_CANDIDATES, variables=TRAINING),
    "distill": _technique(uses="retrain", trains=True),
    "prune": _technique(trains=True),
    "cluster": _technique(trains=True),
    "simplify": _technique(),
    "quantize": _technique("onnx/quantize"),
    "build": StepInfo(
        FRAMEWORK, "optimize", "cell", ("check", CANDIDATE), ("engines", "frameworks", *ONNX, "data/tokens.py")
    ),
    "validate": StepInfo(
        FRAMEWORK,
        "accuracy_validation",
        "cell",
        ("check", "retrain", "build", BASELINE_ENGINE),
        ("engines", "frameworks", *ONNX, "measure", *DATA),
        gates=True,
        measures=True,
    ),
    "select": StepInfo(FRAMEWORK, "accuracy_validation", cached=False, gates=True, retried=False, measures=True),
    "trial": StepInfo(
        "serve", "small_scale_test", cached=False, gates=True, retried=False, moves_traffic=True, measures=True
    ),
    "rollout": StepInfo("serve", "full_rollout", cached=False, gates=True, retried=False, moves_traffic=True),
    "report": StepInfo("serve", "report", cached=False),
    "rollback": StepInfo("serve", None, cached=False, moves_traffic=True),
}
"""In the order of the flow. The DAG, the Kubeflow package, the display and the pods read all that they know of steps
here; a step's module has its name."""

TECHNIQUES = tuple(name for name, info in STEPS.items() if info.per == "recipe")
"""Steps that make one candidate from another, in the order in which a recipe names them."""


def environment_of(step: str, framework: str, engine: str | None = None) -> str:
    """The environment in which a step runs, for a spec of this framework and, in a cell with a target, its engine."""
    environment = STEPS[step].environment
    if environment != FRAMEWORK:
        return environment
    own = ENGINES[engine].environment if engine is not None else None
    return own or FRAMEWORKS[framework].environment
