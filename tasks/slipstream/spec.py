"""The spec: one YAML file that says what to optimize, how good it must stay and how it goes live.

This module is the single source of the vocabulary: the JSON Schema, the reference in docs/spec.md and the
Airflow trigger form are generated from it. Validation is pure: it asks no network, GPU or environment.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from slipstream.engines import ENGINES
from slipstream.errors import SpecError

Technique = Literal["distill", "prune", "quantize"]
TECHNIQUES: tuple[Technique, ...] = ("distill", "prune", "quantize")
BASELINE = "baseline"
"""Name of the implicit recipe with no techniques: the reference for every gate."""

NAME = r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"
REGISTRY = r"^models:/[A-Za-z0-9_.-]+@[A-Za-z0-9_-]+$"
SCHEDULE = r"^(@(hourly|daily|weekly|monthly|quarterly|yearly)|[-\w*,/]+( +[-\w*,/#]+){4})$"
FUNCTION_NAME = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
PATTERNS = {
    FUNCTION_NAME: "of the form module:function, such as examples.fashion:data",
    NAME: "a name of lower-case letters, digits and hyphens, at most 40 of them",
    REGISTRY: "of the form models:/NAME@ALIAS, such as models:/fashion-resnet@source",
    SCHEDULE: "a preset such as @weekly, nor a cron expression of five fields such as `0 3 * * 1`",
}
"""What a pattern means, for the error that quotes it."""

Name = Annotated[str, Field(pattern=NAME)]


def _function(value: str) -> str:
    if not re.match(FUNCTION_NAME, value):
        raise ValueError(f"{value!r} is not {PATTERNS[FUNCTION_NAME]}")
    return value


def _percent(value: object) -> object:
    """`5%` and `5` both mean five percent."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return value.strip().removesuffix("%").strip()
    return value


def _uri(value: str) -> str:
    if "://" in value and not value.startswith("s3://"):
        raise ValueError(f"{value!r} is neither a local path nor an s3:// URI")
    return value


FunctionName = Annotated[str, AfterValidator(_function)]
Percent = Annotated[
    float,
    BeforeValidator(_percent, json_schema_input_type=Annotated[float, Field(ge=0, le=100)] | str),
    Field(ge=0, le=100),
]
FileUri = Annotated[str, AfterValidator(_uri)]


class Section(BaseModel):
    """Base of every part of a spec: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Call(Section):
    """A function in the user's code and the keyword arguments it is called with."""

    function: FunctionName
    """`module:function`, importable from the folder that SLIPSTREAM_CODE names."""
    params: dict[str, int | float | str | bool] = {}
    """Keyword arguments."""


def _call(value: object) -> object:
    return {"function": value} if isinstance(value, str) else value


UserFunction = Annotated[
    Call, BeforeValidator(_call, json_schema_input_type=Annotated[str, Field(pattern=FUNCTION_NAME)] | Call)
]


class Model(Section):
    """Where the trained model comes from."""

    registry: Annotated[str, Field(pattern=REGISTRY)]
    """Registered model and alias, such as `models:/fashion-resnet@source`. Moving the alias starts a run."""
    framework: Literal["torch"] = "torch"
    """Framework of the trained model."""
    architecture: UserFunction
    """Builds the untrained network; weights are loaded into it, so that nothing is ever unpickled."""
    train: UserFunction | None = None
    """Trains the model. Scheduled runs retrain with it; without it every run starts from the registry."""

    @property
    def name(self) -> str:
        """Name of the registered model."""
        return self.registry.removeprefix("models:/").partition("@")[0]

    @property
    def alias(self) -> str:
        """Alias that points at the version to optimize."""
        return self.registry.partition("@")[2]


class DataFiles(Section):
    """Splits as `.npz` files with arrays `inputs` and `labels`."""

    train: FileUri
    """Training split, local path or s3:// URI. Calibration samples are drawn from it."""
    test: FileUri
    """Held-out split. Gates are judged on it and on nothing else."""


FILES, FUNCTION = "<files>", "<function>"


def _data_kind(value: object) -> str:
    """Decides which of the two is meant, so that a mistake in one is not also reported as one in the other."""
    given = value.keys() if isinstance(value, Mapping) else ()
    files = isinstance(value, DataFiles) or ({"train", "test"} & set(given) and "function" not in given)
    return FILES if files else FUNCTION


DataSource = Annotated[
    Annotated[DataFiles, Tag(FILES)] | Annotated[UserFunction, Tag(FUNCTION)], Discriminator(_data_kind)
]


class Objective(Section):
    """How good the model must stay and how fast it must get."""

    metric: Literal["top1", "top5"] = "top1"
    """Quality metric, scored per sample so that engines are compared with the baseline in pairs."""
    max_drop: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Largest allowed drop of the metric against the baseline, in percentage points."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence of every bound that a gate uses."""
    latency_p99_ms: Annotated[float, Field(gt=0)] | None = None
    """Upper limit for the 99th percentile of the latency at batch 1, in milliseconds."""
    prefer: Literal["latency", "throughput", "size", "accuracy"] = "latency"
    """Which of the passing engines becomes the release."""


class Distill(Section):
    """Knowledge distillation (Hinton et al. 2015): a small student learns the baseline's soft answers."""

    student: UserFunction
    """Builds the untrained student network."""
    temperature: Annotated[float, Field(ge=1, le=100)] = 4.0
    """Softens both distributions; the soft loss is scaled by its square."""
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the soft loss in the sum of soft and hard loss."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 5
    """Training epochs."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Peak of the one-cycle schedule."""


class Prune(Section):
    """Structured channel pruning in rounds, each followed by fine-tuning."""

    sparsity: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, lt=1)]] = (0.3, 0.5)
    """Share of channels removed after the first and after the last round."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 3
    """Rounds; the share grows along the cubic schedule of Zhu and Gupta (2017)."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Fine-tuning epochs after each round."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Peak of the one-cycle schedule of each round's fine-tuning."""
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the soft loss: the network also relearns its own answers from before pruning. 0 turns that off."""
    temperature: Annotated[float, Field(ge=1, le=100)] = 4.0
    """Softens those answers, as in distillation."""
    round_to: Annotated[int, Field(ge=1, le=128)] = 8
    """Channel counts stay multiples of this, since engines compute in blocks."""

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.sparsity[0] > self.sparsity[1]:
            raise ValueError(f"sparsity must not shrink, but goes from {self.sparsity[0]} to {self.sparsity[1]}")
        return self


class Quantize(Section):
    """Post-training quantization with calibration on samples of the training split."""

    scheme: Literal["int8"] = "int8"
    """Number format of weights and activations."""
    samples: Annotated[int, Field(ge=16, le=100_000)] = 300
    """Calibration samples, drawn from the training split only."""
    per_channel: bool = True
    """One scale for each output channel of a weight, instead of one for the tensor."""


class Target(Section):
    """Where an engine runs."""

    engine: str
    """Engine: `openvino` or `onnxruntime`."""
    device: str = "CPU"
    """Device in the engine's own words."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    """Threads that one inference may use."""
    precision: Literal["f32", "bf16"] = "f32"
    """Precision of what is not quantized. Pinned, since OpenVINO otherwise picks BF16 by itself."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; known: {', '.join(sorted(ENGINES))}")
        return self


class Guardrails(Section):
    """Limits that abort a small-scale test or a rollout at once and put the traffic back."""

    max_error_rate: Percent = 1.0
    """Largest share of failed requests, in percent."""
    max_disagreement: Percent = 10.0
    """Largest share of requests that champion and challenger answer differently, in percent (upper bound)."""
    max_accuracy_drop: Annotated[float, Field(gt=0, le=100)] = 5.0
    """Largest drop of the quality metric against the champion in the small-scale test, in percentage points (upper
    bound). Wider than `objective.max_drop`, which stage 1 judges on all samples: here are only `shadow` of them."""
    max_p99_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Largest ratio of the challenger's p99 latency to the champion's, measured side by side."""
    max_p99_ms: Annotated[float, Field(gt=0)] = 250.0
    """Hard cap on the p99 latency as the client sees it, in milliseconds. On a machine that others keep busy it is
    at least `max_p99_ratio` times the champion's own p99 in the same test."""
    max_memory_mib: Annotated[int, Field(gt=0)] = 4096
    """Largest resident memory of the model server, in MiB."""


class SmallScaleTest(Section):
    """Stage 2: the challenger beside the champion, first in shadow, then with a small share."""

    shadow: Annotated[int, Field(ge=50, le=1_000_000)] = 500
    """Requests that are mirrored to the challenger; the two answers are compared in pairs."""
    share: Annotated[
        float,
        BeforeValidator(_percent, json_schema_input_type=Annotated[float, Field(gt=0, le=50)] | str),
        Field(gt=0, le=50),
    ] = 5.0
    """Share of traffic that the challenger then answers, in percent."""
    requests: Annotated[int, Field(ge=50, le=10_000_000)] = 2000
    """Requests sent while the challenger has that share."""
    rate_per_s: Annotated[float, Field(gt=0, le=10_000)] = 100.0
    """Paced request rate."""


class Rollout(Section):
    """Stage 3: the traffic moves step by step, guarded, and the registry follows."""

    steps: Annotated[tuple[Annotated[int, Field(gt=0, le=100)], ...], Field(min_length=1)] = (25, 50, 100)
    """Shares of traffic in percent; the last is 100."""
    requests: Annotated[int, Field(ge=50, le=10_000_000)] = 500
    """Requests observed at each step."""
    rate_per_s: Annotated[float, Field(gt=0, le=10_000)] = 100.0
    """Paced request rate."""
    approval: bool = False
    """Whether a person must approve in the Airflow UI before the rollout starts."""

    @model_validator(mode="after")
    def _ends_at_all(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError(f"steps must grow and end at 100, but are {list(self.steps)}")
        return self


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
    """Named lists of techniques, in the order distill, prune, quantize."""
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
            if "distill" in techniques and self.distill is None:
                raise ValueError(f"recipes.{name} distills, but there is no `distill:` section with a student")
        return self

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


def load(path: Path) -> Spec:
    """Read and validate a spec file. Raises SpecError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None
    return parse(text, str(path))


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
