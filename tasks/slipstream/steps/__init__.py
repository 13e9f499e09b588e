"""The steps: one module for each container command. This table is all that the rest knows of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slipstream.engines import ENGINES
from slipstream.frameworks import FRAMEWORKS

FRAMEWORK = "framework"
"""Placeholder for the environment of the spec's framework, or of an engine that has its own."""

TRAINING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""OpenMP's threads otherwise spin while they wait for one another: with a neighbour on one of two cores an epoch of
the example took 460 s instead of 66 s. Measuring steps keep the default, which is faster on a quiet machine."""


@dataclass(frozen=True)
class StepInfo:
    """Where a step runs and what its identity covers."""

    environment: str
    """Environment (containers/NAME) that the step needs."""
    sources: tuple[str, ...] = ()
    """Parts of this package, beside its own module, that decide its result. What `data` gives counts by its digests."""
    cached: bool = True
    """Whether an equal identity means an equal result; false for steps that act on the world."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables to set, unless they are set, before the step loads its libraries."""

    @property
    def trains(self) -> bool:
        """Whether the step trains, and so may do so in several processes."""
        return self.variables is TRAINING


MAKES_CANDIDATES = ("frameworks", "agreement", "candidates.py", "data.py", "tokens.py")

STEPS: dict[str, StepInfo] = {
    "check": StepInfo(FRAMEWORK, cached=False),
    "retrain": StepInfo(FRAMEWORK, MAKES_CANDIDATES, variables=TRAINING),
    "distill": StepInfo(FRAMEWORK, MAKES_CANDIDATES, variables=TRAINING),
    "prune": StepInfo(FRAMEWORK, MAKES_CANDIDATES, variables=TRAINING),
    "cluster": StepInfo(FRAMEWORK, MAKES_CANDIDATES, variables=TRAINING),
    "simplify": StepInfo(FRAMEWORK, MAKES_CANDIDATES),
    "quantize": StepInfo(FRAMEWORK, (*MAKES_CANDIDATES, "quantization")),
    "build": StepInfo(FRAMEWORK, ("engines", "frameworks", "agreement", "tokens.py")),
    "validate": StepInfo(FRAMEWORK, ("engines", "frameworks", "measure", "data.py", "tokens.py")),
    "select": StepInfo(FRAMEWORK, cached=False),
    "trial": StepInfo("serve", cached=False),
    "rollout": StepInfo("serve", cached=False),
    "report": StepInfo("serve", cached=False),
    "rollback": StepInfo("serve", cached=False),
}


def environment_of(step: str, framework: str, engine: str | None = None) -> str:
    """The environment in which a step runs, for a spec of this framework and, in a cell with a target, its engine."""
    environment = STEPS[step].environment
    if environment != FRAMEWORK:
        return environment
    own = ENGINES[engine].environment if engine is not None else None
    return own or FRAMEWORKS[framework].environment
