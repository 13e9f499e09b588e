"""The flow as data: one row for each step, which is a module of this package and a container command."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from slipstream.engines import ENGINES
from slipstream.frameworks import FRAMEWORKS

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
    """Whether it deploys releases and splits their traffic: one at a time for each model, with the rights to do so."""
    measures: bool = False
    """Whether it measures time: it gets the whole machine, and others are to keep quiet."""

    @property
    def trains(self) -> bool:
        """Whether the step trains, and so may do so in several processes."""
        return self.variables is TRAINING


MAKES_CANDIDATES = ("frameworks", "agreement", "candidates.py", "data.py", "tokens.py")


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
    "quantize": _technique("quantization"),
    "build": StepInfo(
        FRAMEWORK, "optimize", "cell", ("check", CANDIDATE), ("engines", "frameworks", "agreement", "tokens.py")
    ),
    "validate": StepInfo(
        FRAMEWORK,
        "accuracy_validation",
        "cell",
        ("check", "retrain", "build", BASELINE_ENGINE),
        ("engines", "frameworks", "measure", "data.py", "tokens.py"),
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
