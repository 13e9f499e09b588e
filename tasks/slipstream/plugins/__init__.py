"""The tables: every engine, framework, scheme, technique, metric, step and runtime by name, with its facts.

Plain data. The spec's vocabulary, its schema, the docs, `check`, the DAG and the identities are derived from it; a
module is imported only when its entry is used. Installed packages add entries by entry points (docs/extending.md).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from slipstream.plugins.table import Table, inserted, installed

BASELINE = "baseline"
"""Name of the implicit recipe with no techniques: the reference for every gate."""

CHECK, RETRAIN, BUILD, VALIDATE, SELECT = "check", "retrain", "build", "validate", "select"
TRIAL, ROLLOUT, REPORT, ROLLBACK = "trial", "rollout", "report", "rollback"
"""Names of the steps that are not techniques."""

# Engines

SERVE = "serve"
"""Environment of the model servers of engines without a separate one."""


@dataclass(frozen=True)
class EngineInfo:
    """Facts about an engine that are known without loading it."""

    module: str
    environment: str | None = None
    """Environment (containers/NAME) that builds and validates it; None if the framework's own has its libraries."""
    server: str | None = SERVE
    """Environment of its model servers; None for an engine that is measured for comparison and never released."""
    frameworks: tuple[str, ...] = ()
    """Frameworks whose models it builds; empty means all. A spec with another is rejected."""
    schemes: tuple[str, ...] = ("int8",)
    """Values of `quantize.scheme` that it computes in, or at least keeps small; a spec with another is rejected.
    Without any, an engine accepts no quantized model: recipes that quantize skip its targets."""


_ENGINES = {
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
ENGINES = Table(lambda: _ENGINES | installed("slipstream.engines", EngineInfo, _ENGINES))
"""Facts by name in the spec."""


# Frameworks


@dataclass(frozen=True)
class FrameworkInfo:
    """Facts about a framework that are known without loading it."""

    module: str
    environment: str
    """Environment (containers/NAME) of the steps that work on its models."""
    distributions: tuple[str, ...]
    """PyPI distributions whose versions are part of the identity of what it makes."""
    trains: bool = True
    """Whether its models can be trained; if not, its module is a Framework, but not a Trainer."""
    keeps: tuple[str, ...] = ()
    """Files and folders of a candidate that stay next to its quantized ONNX form, with the calibration samples: for
    engines that convert from them."""
    prune_methods: tuple[str, ...] = ("channels",)
    """Supported values of `prune.method`."""
    quantization_aware: bool = False
    """Whether it trains with rounded weights (`quantize.epochs`)."""
    distributed: bool = False
    """Whether several processes can train together (`training.workers`)."""


FRAMEWORKS: dict[str, FrameworkInfo] = {
    "keras": FrameworkInfo(
        "slipstream.frameworks.keras",
        "tensorflow",
        ("tensorflow", "tf-keras", "tensorflow-model-optimization", "tf2onnx", "onnx", "onnxruntime", "numpy"),
        keeps=("saved_model",),
        prune_methods=("magnitude", "2:4"),
        quantization_aware=True,
    ),
    "onnx": FrameworkInfo(
        "slipstream.frameworks.onnx",
        "torch",
        ("onnx", "onnxruntime", "numpy"),
        trains=False,
    ),
    "torch": FrameworkInfo(
        "slipstream.frameworks.torch",
        "torch",
        ("torch", "torch-pruning", "safetensors", "onnx", "onnxruntime", "numpy"),
        distributed=True,
    ),
}
"""Facts by name in the spec."""


# Quantization schemes


@dataclass(frozen=True)
class SchemeInfo:
    """Facts about a number format that are known without loading its quantizer."""

    module: str
    bits: Literal[4, 8]
    """Bits of a weight."""
    activations: bool
    """Whether activations are rounded too, so that layers compute with integers; if not, weights are only stored in
    it."""
    calibrated: bool
    """Whether the ranges of activations come from calibration samples."""


SCHEMES = {
    "int8": SchemeInfo("slipstream.onnx.quantize.static", 8, activations=True, calibrated=True),
    "int8-dynamic": SchemeInfo("slipstream.onnx.quantize.dynamic", 8, activations=True, calibrated=False),
    "int8-weights": SchemeInfo("slipstream.onnx.quantize.weights", 8, activations=False, calibrated=False),
    "int4-weights": SchemeInfo("slipstream.onnx.quantize.weights", 4, activations=False, calibrated=False),
}
"""Facts by `quantize.scheme`."""


# Metrics


@dataclass(frozen=True)
class MetricInfo:
    """Facts about a metric that are known without loading it."""

    module: str
    attribute: str
    """Name of the metric in its module."""


_METRICS = {
    "top1": MetricInfo("slipstream.measure.metrics.classification", "TOP1"),
    "top5": MetricInfo("slipstream.measure.metrics.classification", "TOP5"),
    "f1": MetricInfo("slipstream.measure.metrics.classification", "F1"),
    "map": MetricInfo("slipstream.measure.metrics.detection", "MAP"),
    "miou": MetricInfo("slipstream.measure.metrics.segmentation", "MIOU"),
}
METRICS = Table(lambda: _METRICS | installed("slipstream.metrics", MetricInfo, _METRICS))
"""Location of a metric by name in the spec. Any other name is the user's own, `module:function` (metrics/user.py)."""


def short_name(metric: str) -> str:
    """Return a metric's name in tables and charts: the spec's, or the user's function without its module."""
    return metric.rpartition(":")[2]


# Techniques

TRAINING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP's threads otherwise spin while they wait for one another: with another process on one of two cores an epoch of
the example took 460 s instead of 66 s. Measuring steps keep the default, which is faster on a quiet machine."""

CANDIDATE, BASELINE_ENGINE = "(candidate)", "(baseline's engine)"
"""In `StepInfo.uses`: the recipe's latest model before the step, and the baseline's engine on the same target."""


@dataclass(frozen=True)
class TechniqueInfo:
    """Facts about a technique, a step that makes one candidate from another, that are known without loading it."""

    module: str
    """Dotted path of the module with its functions (techniques/base.py)."""
    section: str | None = None
    """Its settings in the spec, as `module:Class`, under the technique's own name; None for one without settings."""
    frameworks: tuple[str, ...] = ()
    """Frameworks whose models it changes; empty means all. A spec with another is rejected."""
    before: str = "quantize"
    """Technique that follows a package's own one in a recipe."""
    uses: str = CANDIDATE
    """Its input: the recipe's latest model, or the output of a step by name."""
    trains: bool = False
    """Whether it trains: its module then has `train`, and it gets the whole machine."""
    sources: tuple[str, ...] = ()
    """Parts of this package, in addition to its own module and what all techniques use, that determine its result."""


_SECTIONS = "slipstream.spec.sections"
_TECHNIQUES = {
    "distill": TechniqueInfo(
        "slipstream.techniques.distill", f"{_SECTIONS}:Distill", ("keras", "torch"), uses=RETRAIN, trains=True
    ),
    "prune": TechniqueInfo("slipstream.techniques.prune", f"{_SECTIONS}:Prune", ("keras", "torch"), trains=True),
    "cluster": TechniqueInfo("slipstream.techniques.cluster", f"{_SECTIONS}:Cluster", ("keras",), trains=True),
    "simplify": TechniqueInfo("slipstream.techniques.simplify", frameworks=("onnx", "torch")),
    "quantize": TechniqueInfo("slipstream.techniques.quantize", f"{_SECTIONS}:Quantize", sources=("onnx/quantize",)),
}


def _techniques() -> dict[str, TechniqueInfo]:
    table = dict(_TECHNIQUES)
    for name, info in installed("slipstream.techniques", TechniqueInfo, [*_STEPS, *_TECHNIQUES]).items():
        table = inserted(table, {name: info}, before=info.before)
    return table


TECHNIQUES = Table(_techniques)
"""Facts by name in the spec, in the order in which a recipe names them."""


def techniques_of(framework: str) -> tuple[str, ...]:
    """Return techniques that change models of a framework."""
    return tuple(name for name, info in TECHNIQUES.items() if not info.frameworks or framework in info.frameworks)


# Steps

FRAMEWORK = "framework"
"""Placeholder for the environment of the spec's framework, or of an engine with a separate one."""

Stage = Literal["optimize", "accuracy_validation", "small_scale_test", "full_rollout", "report"]


@dataclass(frozen=True)
class StepInfo:
    """A row of the flow: a step's position in it, its inputs, where it runs and what its identity covers."""

    environment: str
    """Environment (containers/NAME) that the step needs."""
    stage: Stage | None
    """Its stage; None for a step outside the flow."""
    per: Literal["run", "recipe", "cell"] = "run"
    """What it runs once for. A technique runs for those recipes that name it."""
    uses: tuple[str, ...] | None = None
    """Steps whose outputs it receives, those of its own cell where they have one; None means all before it."""
    sources: tuple[str, ...] = ()
    """Parts of this package, in addition to its module, that determine its result. `data` counts by its digests."""
    cached: bool = True
    """Whether an equal identity means an equal result; false for steps that act on the outside world."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables to set, unless already set, before the step loads its libraries."""
    gates: bool = False
    """Whether its verdicts decide about a release."""
    retried: bool = True
    """Whether it is retried where exit codes carry no information: a gate must not be repeated until it passes."""
    moves_traffic: bool = False
    """Whether it deploys releases and splits their traffic: one at a time, with the permissions to do so."""
    measures: bool = False
    """Whether it measures time: it gets the whole machine, without other steps."""

    @property
    def trains(self) -> bool:
        """Whether the step trains, and so may do so in several processes."""
        return self.variables is TRAINING


DATA = ("data/splits.py", "data/tokens.py")
ONNX = ("onnx/graph.py", "onnx/session.py", "onnx/agreement")
MAKES_CANDIDATES = ("frameworks", *ONNX, "techniques/candidates.py", *DATA)

_STEPS = {
    CHECK: StepInfo(FRAMEWORK, "optimize", uses=(), cached=False, retried=False),
    RETRAIN: StepInfo(FRAMEWORK, "optimize", uses=(CHECK,), sources=MAKES_CANDIDATES, variables=TRAINING),
    BUILD: StepInfo(
        FRAMEWORK, "optimize", "cell", (CHECK, CANDIDATE), ("engines", "frameworks", *ONNX, "data/tokens.py")
    ),
    VALIDATE: StepInfo(
        FRAMEWORK,
        "accuracy_validation",
        "cell",
        (CHECK, RETRAIN, BUILD, BASELINE_ENGINE),
        ("engines", "frameworks", *ONNX, "measure", *DATA),
        gates=True,
        measures=True,
    ),
    SELECT: StepInfo(FRAMEWORK, "accuracy_validation", cached=False, gates=True, retried=False, measures=True),
    TRIAL: StepInfo(
        SERVE, "small_scale_test", cached=False, gates=True, retried=False, moves_traffic=True, measures=True
    ),
    ROLLOUT: StepInfo(SERVE, "full_rollout", cached=False, gates=True, retried=False, moves_traffic=True),
    REPORT: StepInfo(SERVE, "report", cached=False),
    ROLLBACK: StepInfo(SERVE, None, cached=False, moves_traffic=True),
}
"""All steps except techniques."""


def _step_of(technique: TechniqueInfo) -> StepInfo:
    uses, sources = (CHECK, technique.uses), (*MAKES_CANDIDATES, *technique.sources)
    return StepInfo(FRAMEWORK, "optimize", "recipe", uses, sources, variables=TRAINING if technique.trains else {})


def _steps() -> dict[str, StepInfo]:
    techniques = {name: _step_of(info) for name, info in TECHNIQUES.items()}
    return inserted(_STEPS, techniques, before=BUILD)


STEPS = Table(_steps)
"""In the order of the flow. The DAG, the Kubeflow package, the display and the pods read all facts about steps here."""


def module_of(step: str) -> str:
    """Return the dotted path of the module with a step's functions."""
    return TECHNIQUES[step].module if step in TECHNIQUES else f"slipstream.steps.{step}"


def environment_of(step: str, framework: str, engine: str | None = None) -> str:
    """Return the environment of a step, for a spec of this framework and, in a cell with a target, its engine."""
    environment = STEPS[step].environment
    if environment != FRAMEWORK:
        return environment
    own = ENGINES[engine].environment if engine is not None else None
    return own or FRAMEWORKS[framework].environment


# Runtimes


@dataclass(frozen=True)
class RuntimeInfo:
    """Where steps run."""

    module: str
    """Dotted path of a module, importable in Airflow's environment, with a function `runtime()` (dags/runtimes/)."""


_RUNTIMES = {
    "subprocess": RuntimeInfo("runtimes.local"),
    "docker": RuntimeInfo("runtimes.docker"),
    "kubernetes": RuntimeInfo("runtimes.kubernetes"),
}
RUNTIMES = Table(lambda: _RUNTIMES | installed("slipstream.runtimes", RuntimeInfo, _RUNTIMES))
"""Facts by name in the settings."""
