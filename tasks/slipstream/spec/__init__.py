"""The spec: one YAML file that says what to optimize, how good it must stay and how it goes live.

This package is the single source of the vocabulary: the JSON Schema, the reference in docs/spec.md and the
Airflow trigger form are generated from it. Validation is pure: it asks no network, GPU or environment.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from slipstream.errors import SpecError
from slipstream.frameworks import FRAMEWORKS
from slipstream.spec.fields import PATTERNS, SCHEDULE, Call, Name, Section
from slipstream.spec.sections import (
    FILES,
    FUNCTION,
    DataSource,
    Distill,
    Guardrails,
    Model,
    Objective,
    Prune,
    Quantize,
    Resources,
    Rollout,
    SmallScaleTest,
    Target,
    Toleration,
    Training,
)
from slipstream.steps import STEPS, environment_of

__all__ = [
    "BASELINE", "PATTERNS", "TECHNIQUES", "Call", "Distill", "Guardrails", "Model", "Objective", "Prune", "Quantize",
    "Resources", "Rollout", "SmallScaleTest", "Spec", "Target", "Toleration", "Training", "dump", "json_schema",
    "load", "parse",
]  # fmt: skip

Technique = Literal["distill", "prune", "cluster", "simplify", "quantize"]
TECHNIQUES: tuple[Technique, ...] = ("distill", "prune", "cluster", "simplify", "quantize")
BASELINE = "baseline"
"""Name of the implicit recipe with no techniques: the reference for every gate."""


class Spec(Section):
    """One model, from trained to released."""

    name: Name
    """Name of the spec; its DAG is `optimize-NAME`. The MLflow experiment is named after the registered model."""
    model: Model
    """Where the trained model comes from."""
    data: DataSource
    """A function that returns the splits, or files."""
    objective: Objective = Objective()
    """How good it must stay, how fast it must get."""
    recipes: dict[Name, tuple[Technique, ...]]
    """Named lists of techniques, in the order distill, prune, cluster, simplify, quantize."""
    distill: Distill | None = None
    """Settings of distillation."""
    prune: Prune = Prune()
    """Settings of pruning."""
    quantize: Quantize = Quantize()
    """Settings of quantization."""
    targets: dict[Name, Target]
    """Where engines run."""
    small_scale_test: SmallScaleTest = SmallScaleTest()
    """Stage 2."""
    rollout: Rollout = Rollout()
    """Stage 3."""
    guardrails: Guardrails = Guardrails()
    """Limits for stages 2 and 3."""
    training: Training = Training()
    """How many processes train."""
    resources: dict[str, Resources] = Field(default={})
    """What a step may use in a container or a pod, by the step's name; `default` is for all steps."""
    schedule: Annotated[str, Field(pattern=SCHEDULE)] | None = None
    """Cron expression or preset such as `@weekly`; none means only by hand or by the alias."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.recipes:
            raise ValueError("recipes is empty; name at least one, such as `int8: [quantize]`")
        if not self.targets:
            raise ValueError("targets is empty; name at least one, such as `server: {engine: openvino}`")
        for name, techniques in self.recipes.items():
            if name == BASELINE:
                raise ValueError(f"recipes.{name}: the name is reserved for the unchanged model")
            if list(techniques) != [t for t in TECHNIQUES if t in techniques]:
                raise ValueError(
                    f"recipes.{name}: {list(techniques)} must name each technique once, in the order "
                    f"{', '.join(TECHNIQUES)}"
                )
            has = FRAMEWORKS[self.model.framework].techniques
            if missing := [t for t in techniques if t not in has]:
                raise ValueError(
                    f"recipes.{name}: {', '.join(missing)} cannot be done for a model of framework "
                    f"{self.model.framework}, which has {', '.join(has)}"
                )
            if "distill" in techniques and self.distill is None:
                raise ValueError(f"recipes.{name} distills, but there is no `distill:` section with a student")
        if unknown := sorted(set(self.resources) - {"default", *STEPS}):
            known = ", ".join(("default", *STEPS))
            raise ValueError(f"resources.{unknown[0]}: not a step; known: {known}")
        return self

    def environment_of(self, step: str, target: str | None) -> str:
        """The environment in which a step runs; `target` is that of its cell."""
        return environment_of(step, self.model.framework, self.targets[target].engine if target else None)

    def techniques(self, recipe: str) -> tuple[Technique, ...]:
        """Techniques of a recipe; the baseline has none."""
        return () if recipe == BASELINE else self.recipes[recipe]


def parse(text: str, source: str) -> Spec:
    """Read a spec from YAML text; `source` names it in errors.

    Raises SpecError with one line for each problem: file, field, what is wrong.
    """
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(document, Mapping):
        raise SpecError(f"{source}: a spec is a mapping that starts with `name:`, not {type(document).__name__}")
    try:
        return Spec.model_validate(document)
    except ValidationError as error:
        raise SpecError("\n".join(_explain(source, e) for e in error.errors())) from None


def load(source: Path | str) -> Spec:
    """Read and validate a spec: a path, an s3:// URI, or the document itself as JSON.

    Raises SpecError; Unavailable when S3 is.
    """
    if isinstance(source, str) and source.startswith("{"):
        return parse(source, "the given spec")
    if isinstance(source, str) and source.startswith("s3://"):
        from slipstream import storage

        return parse(storage.read_text(source), source)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{source}: cannot be read: {error}") from None
    return parse(text, str(source))


def dump(spec: Spec) -> str:
    """The spec as YAML, defaults filled in, so that a run's snapshot can be read without this version."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the spec, for editors and for the generated docs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}


def _explain(source: str, error: Mapping[str, Any]) -> str:
    """One line: file, field, what is wrong there and what to do."""
    field = ".".join(str(part) for part in error["loc"] if part not in (FILES, FUNCTION, "[key]"))
    return f"{source}: {field}: {_message(error)}" if field else f"{source}: {_message(error)}"


def _message(error: Mapping[str, Any]) -> str:
    kind, value = error["type"], error["input"]
    if kind == "extra_forbidden":
        return "unknown key; remove it or check its spelling (`slipstream schema` lists all keys)"
    if kind == "missing":
        return "missing; this key is required"
    if kind in ("model_type", "dict_type"):
        return f"must be a mapping of keys to values, not {value!r}"
    if kind == "string_pattern_mismatch":
        return f"{value!r} is not {PATTERNS[error['ctx']['pattern']]}"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    return str(error["msg"]).replace("Input should be", "must be").replace("String should", "must") + f", not {value!r}"
