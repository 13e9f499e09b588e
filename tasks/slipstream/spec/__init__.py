"""The spec: one YAML file that describes what to optimize, the required quality and how it is released.

This package is the single source of the vocabulary: the JSON Schema, the reference in docs/spec.md and the Airflow
trigger form are generated from it. Validation is pure: it uses no network, GPU or environment.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, create_model, model_validator

from slipstream.contract import Json, Section
from slipstream.errors import SpecError
from slipstream.plugins import BASELINE, ENGINES, FRAMEWORKS, SELECT, STEPS, TECHNIQUES, environment_of, techniques_of
from slipstream.spec.document import MAX_BYTES, decode, read
from slipstream.spec.explain import explain
from slipstream.spec.fields import PATTERNS, Call, Name, Optimizer, Schedule
from slipstream.spec.recipes import Use, changes_of, name_of
from slipstream.spec.resources import Resources, Toleration, Training
from slipstream.spec.sections import (
    Cluster,
    DataSource,
    Distill,
    Guardrails,
    Model,
    Objective,
    Prune,
    Quantize,
    Rollout,
    SmallScaleTest,
    Target,
    Waiver,
)

__all__ = [
    "BASELINE", "PATTERNS", "Call", "Cluster", "Distill", "Guardrails", "Model", "Objective", "Optimizer",
    "Prune", "Quantize", "Resources", "Rollout", "SmallScaleTest", "Spec", "Target", "Toleration", "Training", "Waiver",
    "dump", "json_schema", "load", "load_text", "parse",
]  # fmt: skip

log = logging.getLogger(__name__)


class Spec(Section):
    """One model, from trained to released."""

    name: Name
    """Name of the spec; its DAG is `optimize-NAME`. The MLflow experiment is named after the registered model."""
    model: Model
    """Origin of the trained model."""
    data: DataSource
    """A function that returns the splits, or files."""
    objective: Objective = Objective()
    """Required quality and speed."""
    recipes: dict[Name, tuple[Use, ...]]
    """Named lists of techniques, in the order distill, prune, cluster, simplify, quantize. A technique may have its
    own settings, which override those of its section: `[{prune: {sparsity: [0.3, 0.6]}}, quantize]`."""
    distill: Distill | None = None
    """Settings of distillation."""
    prune: Prune = Prune()
    """Settings of pruning."""
    cluster: Cluster = Cluster()
    """Settings of weight clustering."""
    quantize: Quantize = Quantize()
    """Settings of quantization."""
    targets: dict[Name, Target]
    """Engines to build, by name."""
    small_scale_test: SmallScaleTest = SmallScaleTest()
    """Stage 2."""
    rollout: Rollout = Rollout()
    """Stage 3."""
    guardrails: Guardrails = Guardrails()
    """Limits for stages 2 and 3."""
    training: Training = Training()
    """Number of training processes."""
    resources: dict[str, Resources] = Field(default={})
    """What a step may use in a container or a pod, by step name; `default` applies to all steps."""
    schedule: Schedule | None = None
    """Cron expression of five fields such as `0 3 * * 1`, or a preset such as `@weekly`; by default, runs start only by
    hand or by the alias."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random choice."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.recipes:
            raise ValueError("recipes is empty; name at least one, such as `int8: [quantize]`")
        if not self.targets:
            raise ValueError("targets is empty; name at least one, such as `server: {engine: openvino}`")
        for name in self.recipes:
            self._require_recipe(name)
        if unknown := sorted(set(self.resources) - {"default", *STEPS}):
            choices = ", ".join(("default", *STEPS))
            raise ValueError(f"resources.{unknown[0]}: not a step; known: {choices}")
        return self

    def _require_recipe(self, name: str) -> None:
        """Raise ValueError for a recipe whose techniques, or their settings, cannot be."""
        if name == BASELINE:
            raise ValueError(f"recipes.{name}: the name is reserved for the unchanged model")
        techniques = self.techniques(name)
        if list(techniques) != [t for t in TECHNIQUES if t in techniques]:
            raise ValueError(
                f"recipes.{name}: {list(techniques)} must name each technique once, in the order "
                f"{', '.join(TECHNIQUES)}"
            )
        has = techniques_of(self.model.framework)
        if missing := [t for t in techniques if t not in has]:
            raise ValueError(
                f"recipes.{name}: {', '.join(missing)} cannot be done for a model of framework "
                f"{self.model.framework}, which has {', '.join(has)}"
            )
        for technique in techniques:
            try:
                section = self.section(technique, name)
            except ValidationError as error:
                raise ValueError(explain(error, f"recipes.{name}.{technique}", section_of(technique))) from None
            if TECHNIQUES[technique].section is not None and section is None:
                raise ValueError(
                    f"recipes.{name}: there is no section `{technique}:`, and {technique} has settings without a "
                    "default; `slipstream schema` lists them"
                )

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if (first := self.rollout.steps[0]) < self.small_scale_test.share:
            raise ValueError(
                f"rollout.steps: the first is {first} %, less than the {self.small_scale_test.share:g} % of "
                "small_scale_test.share, which comes before it; raise the step or lower the share"
            )
        return self

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        name, info = self.model.framework, FRAMEWORKS[self.model.framework]
        for recipe in self.recipes:
            prune = self.section("prune", recipe)
            if prune is not None and prune.method not in info.prune_methods:
                raise ValueError(
                    f"prune.method: {prune.method} cannot be done for a model of framework {name}, which has "
                    f"{', '.join(info.prune_methods)}"
                )
            if self.trains_for_int8(recipe) and not info.quantization_aware:
                raise ValueError(f"quantize.epochs: models of framework {name} are not trained for INT8; make it 0")
        if self.training.workers > 1 and not info.distributed:
            raise ValueError(f"training.workers: models of framework {name} are not trained by several; make it 1")
        return self

    @model_validator(mode="after")
    def _buildable(self) -> Self:
        for name, target in self.targets.items():
            builds = ENGINES[target.engine].frameworks
            if builds and self.model.framework not in builds:
                raise ValueError(
                    f"targets.{name}: engine {target.engine} builds models of framework {', '.join(builds)} only, not "
                    f"of {self.model.framework}; choose another engine"
                )
            schemes, requested = ENGINES[target.engine].schemes, self.schemes
            if requested and schemes and not requested & set(schemes):
                raise ValueError(
                    f"targets.{name}: engine {target.engine} does not run quantize.scheme "
                    f"{', '.join(sorted(requested))}, only {', '.join(schemes)}; choose another scheme, or "
                    "give that engine a spec of its own"
                )
        for recipe in self.recipes:
            if not any(self.runs(recipe, target) for target in self.targets):
                raise ValueError(
                    f"recipes.{recipe}: no target's engine runs scheme {self.scheme_of(recipe)}; choose "
                    "another under quantize, or add a target whose engine does"
                )
        if not any(self.releasable(name) for name in self.targets):
            raise ValueError(
                "targets: none of them can be released, since their engines are for comparison only; add one with an "
                "engine that is served, such as openvino"
            )
        return self

    def runs(self, recipe: str, target: str) -> bool:
        """Return whether a recipe is built for a target: a quantizing one only if the engine supports its scheme."""
        scheme = self.scheme_of(recipe)
        return scheme is None or scheme in ENGINES[self.targets[target].engine].schemes

    def releasable(self, target: str) -> bool:
        """Return whether a target's engines can be released, and are not only for comparison."""
        return ENGINES[self.targets[target].engine].server is not None

    @property
    def competing(self) -> int:
        """Number of engines that compete for the release: every recipe on every target whose engine is served."""
        return sum(self.runs(r, t) for t in self.targets if self.releasable(t) for r in self.recipes)

    def environment_of(self, step: str, target: str | None) -> str:
        """Return the environment of a step; `target` is its cell's.

        `select` loads engines of all targets: it runs in their own environment if all share one.
        """
        targets = [self.targets[target]] if target else list(self.targets.values()) if step == SELECT else []
        environments = {environment_of(step, self.model.framework, t.engine) for t in targets}
        return environments.pop() if len(environments) == 1 else environment_of(step, self.model.framework)

    def scheme_of(self, recipe: str) -> str | None:
        """Return the scheme of a recipe; None for one that does not quantize."""
        quantize = self.section("quantize", recipe)
        return None if quantize is None else str(quantize.scheme)

    def trains_for_int8(self, recipe: str) -> bool:
        """Return whether a recipe has quantization-aware training."""
        quantize = self.section("quantize", recipe)
        return quantize is not None and quantize.epochs > 0

    @property
    def schemes(self) -> set[str]:
        """Schemes of all recipes that quantize."""
        return {scheme for recipe in self.recipes if (scheme := self.scheme_of(recipe)) is not None}

    @property
    def functions(self) -> dict[str, Call]:
        """The user's functions that the spec names, except for the metric, by field."""
        functions = {"data": self.data} if isinstance(self.data, Call) else {}
        sections = {"model": self.model} | {technique: getattr(self, technique, None) for technique in TECHNIQUES}
        sections |= {f"recipes.{r}.{t}": self.section(t, r) for r in self.recipes for t in self.techniques(r)}
        for field, section in sections.items():
            calls = {f"{field}.{key}": value for key, value in section or () if isinstance(value, Call)}
            functions |= {name: call for name, call in calls.items() if call not in functions.values()}
        return functions

    @property
    def architectures(self) -> tuple[Call, ...]:
        """Functions that may build a candidate's network: the model's own, and those named in techniques' sections."""
        may = ("model.architecture", "recipes", *TECHNIQUES)
        return tuple(call for field, call in self.functions.items() if field in may or field.partition(".")[0] in may)

    def techniques(self, recipe: str) -> tuple[str, ...]:
        """Return the techniques of a recipe; the baseline has none."""
        return () if recipe == BASELINE else tuple(map(name_of, self.recipes[recipe]))

    def section(self, technique: str, recipe: str) -> Any:
        """Return the settings of a technique in a recipe: its section, with the recipe's own settings.

        None if the recipe does not have the technique, and for one without settings. Raise ValidationError for
        values that do not fit.
        """
        uses = self.recipes.get(recipe, ())
        changes = next((changes_of(use) for use in uses if name_of(use) == technique), None)
        section = getattr(self, technique, None)
        if changes is None or (section is None and not changes):
            return None
        if section is None:
            return section_of(technique).model_validate(dict(changes))
        return section.over(changes) if changes else section


def section_of(technique: str) -> type[Section]:
    """Return the class of a technique's settings; an empty section for one without. Raise what importing it raises."""
    path = TECHNIQUES[technique].section
    if path is None:
        return Section
    module, _, name = path.partition(":")
    section: type[Section] = getattr(importlib.import_module(module), name)
    return section


def _plugin_sections() -> Iterator[tuple[str, Any]]:
    """Return name and definition of a field for each technique of another package that has settings.

    A technique whose settings cannot be loaded is left out, with a warning.
    """
    for name, info in list(TECHNIQUES.items()):
        if info.section is None or info.section.startswith(f"{__name__}."):
            continue
        try:
            section = section_of(name)
            if name in Spec.model_fields:
                raise ValueError(f"the spec has a key {name} already")
            required = any(field.is_required() for field in section.model_fields.values())
            default = Field(default=None if required else section(), description=section.__doc__ or name)
        except (Exception, SystemExit) as error:
            log.warning("technique %s is left out: %s: %s: %s", name, info.section, type(error).__name__, error)
            del TECHNIQUES[name]
            continue
        yield name, (section | None if required else section, default)


if not TYPE_CHECKING and (sections := dict(_plugin_sections())):
    Spec = create_model("Spec", __base__=Spec, __module__=__name__, __doc__=Spec.__doc__, **sections)


def parse(text: str, source: str) -> Spec:
    """Read a spec from YAML text; `source` names it in errors.

    Raise SpecError with one line for each problem: file, field, what is wrong.
    """
    document = read(text, source)
    if not isinstance(document, Mapping):
        raise SpecError(f"{source}: a spec is a mapping that starts with `name:`, not {type(document).__name__}")
    try:
        return Spec.model_validate(document)
    except ValidationError as error:
        raise SpecError(explain(error, source, Spec)) from None


def load(source: Path | str) -> Spec:
    """Read and validate a spec: a path, an s3:// URI, or the document itself as JSON.

    Raise SpecError; Unavailable if S3 is.
    """
    if isinstance(source, str) and source.startswith("{"):
        return parse(source, "the given spec")
    return parse(load_text(source), str(source))


def load_text(source: Path | str) -> str:
    """Return the text of a spec's file: a path or an s3:// URI. Raise SpecError; Unavailable if S3 is."""
    if isinstance(source, str) and source.startswith("s3://"):
        from slipstream import storage

        return storage.read_text(source)
    try:
        with Path(source).open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(f"{source}: cannot be read: {error.strerror}") from None
    return decode(content, str(source))


def dump(spec: Spec) -> str:
    """Return the spec as YAML with all defaults, so that a run's snapshot can be read without this version."""
    return yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)


def json_schema() -> Json:
    """Return the JSON Schema of the spec, for editors and for the generated docs."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}
