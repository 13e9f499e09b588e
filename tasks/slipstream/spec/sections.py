"""The sections of a spec. Their docstrings are the reference in docs/spec.md."""

import datetime
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from slipstream.contract import Section
from slipstream.plugins import ENGINES, FRAMEWORKS, METRICS, SCHEMES
from slipstream.spec.fields import (
    FUNCTION_NAME,
    FileUri,
    Optimizer,
    Percent,
    RegisteredModel,
    UserFunction,
    percent,
)


class Model(Section):
    """Where the trained model comes from."""

    registry: RegisteredModel
    """Registered model and alias, such as `models:/fashion-resnet@source`. Moving the alias starts a run."""
    framework: str = "torch"
    """Framework of the trained model."""
    architecture: UserFunction | None = None
    """Builds the untrained network; weights are loaded into it, so nothing is ever unpickled. Required unless the
    model's own file describes the computation, as ONNX does."""
    loss: UserFunction | None = None
    """Loss for learning from the labels in distillation and in fine-tuning after pruning: a function of outputs and
    labels that returns the mean loss of a batch. The default is cross entropy, for labels that are classes or maps of
    classes."""
    file: FileUri | None = None
    """File of a trained model to start from, a local path or s3:// URI: each run registers it, unless it is already
    registered, and moves the alias to it."""
    train: UserFunction | None = None
    """Trains the model. Scheduled runs retrain with it; without it, every run starts from the registry."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.framework not in FRAMEWORKS:
            raise ValueError(f"unknown framework {self.framework!r}; known: {', '.join(sorted(FRAMEWORKS))}")
        if self.framework == "torch" and self.architecture is None:
            raise ValueError("architecture is missing: name the function that builds the network, as module:function")
        if self.file is not None and self.train is not None:
            raise ValueError("file and train cannot both be where the model comes from; leave one out")
        if not FRAMEWORKS[self.framework].trains and (self.architecture or self.train):
            raise ValueError(
                f"architecture and train are of no use: models of framework {self.framework} are not trained here; "
                "name a trained model's file under file, or register it"
            )
        return self

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
    """Held-out split. Gates are judged only on it."""
    tokenizer: FileUri | None = None
    """JSON of the Hugging Face tokenizer that converted text to inputs; the served model then also accepts text."""

    @property
    def splits(self) -> dict[str, str]:
        """URIs by name."""
        return {"train": self.train, "test": self.test}


FILES, FUNCTION = "<files>", "<function>"


def _data_kind(value: object) -> str:
    """Return which of the two is meant, so that a mistake in one is not also reported as one in the other."""
    keys = value.keys() if isinstance(value, Mapping) else ()
    files = isinstance(value, DataFiles) or ({"train", "test"} & set(keys) and "function" not in keys)
    return FILES if files else FUNCTION


DataSource = Annotated[
    Annotated[DataFiles, Tag(FILES)] | Annotated[UserFunction, Tag(FUNCTION)], Discriminator(_data_kind)
]


def _metric(value: str) -> str:
    if value not in METRICS and not re.fullmatch(FUNCTION_NAME, value):
        raise ValueError(f"unknown metric {value!r}; known: {', '.join(METRICS)}, or a function as module:function")
    return value


class Objective(Section):
    """Quality that the model must keep, and speed that it must reach."""

    metric: Annotated[str, AfterValidator(_metric)] = "top1"
    """Quality metric that compares engines with the baseline on the same samples: `top1`, `top5` or `f1`
    (macro average) of class scores, `map` (COCO's) of boxes, `miou` of segmentation maps, or your own function as
    `module:function`, which takes outputs and labels and returns a score from 0 to 1 for each sample."""
    max_drop: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Largest allowed drop of the metric from the baseline, in percentage points."""
    max_drop_from_champion: Annotated[float, Field(gt=0, le=100)] | None = None
    """Largest allowed drop of the metric from the current release, in percentage points; by default, `max_drop`. A
    first release needs none."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Confidence of every verdict. If several engines compete for the release, each bound of a drop is stricter, so
    that the best of them is good with this confidence: with 6 engines at 0.95, each bound holds at 0.9917."""
    latency_p99_ms: Annotated[float, Field(gt=0)] | None = None
    """Upper limit for the 99th percentile of the latency at batch 1, in milliseconds. On a busy machine, a breach
    proves nothing and stays undecided; the engine is then not released unless a person waives the limit
    (`guardrails.waivers`)."""
    prefer: Literal["latency", "throughput", "size", "accuracy"] = "latency"
    """Criterion that picks the release from the passing engines. Latency and throughput are compared in one run in
    which all engines take turns; of those that may be as fast as the fastest, the smallest is picked, then the first by
    name."""


def _require_rate(optimizer: Optimizer, fields: Collection[str]) -> None:
    if optimizer == "adamw" and "learning_rate" not in fields:
        raise ValueError("learning_rate is missing: the default is for sgd; adamw takes rates of about 0.0005")


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
    optimizer: Optimizer = "sgd"
    """`sgd` with Nesterov momentum, or `adamw`, which transformers need."""

    @model_validator(mode="after")
    def _rated(self) -> Self:
        _require_rate(self.optimizer, self.model_fields_set)
        return self


class Prune(Section):
    """Pruning with fine-tuning: whole channels in rounds, or single weights while the network trains."""

    method: Literal["channels", "magnitude", "2:4"] = "channels"
    """What is removed: `channels` (PyTorch) makes the network narrower; in Keras, `magnitude` sets the smallest
    weights to zero, and `2:4` sets two of each four along the inputs to zero, ignoring `sparsity`."""
    sparsity: tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=0, lt=1)]] = (0.3, 0.5)
    """Share of channels or weights removed at the beginning and at the end; in between, it follows the cubic schedule
    of Zhu and Gupta (2017)."""
    rounds: Annotated[int, Field(ge=1, le=100)] = 3
    """Number of pruning rounds for `channels`."""
    begin_step: Annotated[int, Field(ge=0)] = 0
    """Training step at which `magnitude` starts, with the first share."""
    end_step: Annotated[int, Field(ge=1)] = 1000
    """Training step at which `magnitude` reaches the last share."""
    frequency: Annotated[int, Field(ge=1)] = 100
    """Training steps between two increases of the share for `magnitude`; each one selects the zero weights again."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Fine-tuning epochs: after each round for `channels`, in total for the other methods."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """Peak of the one-cycle schedule of each round's fine-tuning."""
    optimizer: Optimizer = "sgd"
    """`sgd` or `adamw`, as in distillation."""
    soft_weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the soft loss, by which the network also relearns its own answers from before pruning. 0 disables it."""
    temperature: Annotated[float, Field(ge=1, le=100)] = 4.0
    """Softens those answers, as in distillation."""
    round_to: Annotated[int, Field(ge=1, le=128)] = 8
    """Channel counts stay multiples of this number, since engines compute in blocks."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require_rate(self.optimizer, self.model_fields_set)
        if self.sparsity[0] > self.sparsity[1]:
            raise ValueError(f"sparsity must not shrink, but goes from {self.sparsity[0]} to {self.sparsity[1]}")
        steps = self.end_step - self.begin_step
        if self.method == "magnitude" and (steps <= 0 or steps % self.frequency):
            raise ValueError(
                f"frequency must divide the {steps} steps from begin_step to end_step, but is {self.frequency}: the "
                "last share would never be reached"
            )
        return self


class Cluster(Section):
    """Weight clustering (Han et al. 2016): each layer's weights take few distinct values, which compresses well."""

    clusters: Annotated[int, Field(ge=2, le=256)] = 16
    """Distinct values in each layer's weights, found by k-means++. In a pruned network, zero is one of them."""
    epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Fine-tuning epochs, which train the values."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.005
    """Peak of the one-cycle schedule. It is small, since weights that move far lose their cluster."""


if TYPE_CHECKING:
    Scheme = str
else:
    Scheme = Literal[tuple(SCHEMES)]


class Quantize(Section):
    """Post-training quantization with calibration on samples of the training split."""

    scheme: Scheme = "int8"
    """Number format: `int8` for weights and activations, with ranges from calibration; `int8-dynamic` with ranges
    computed for each input; `int8-weights` and `int4-weights` for weights only, which saves memory. A recipe is
    built for the targets whose engine supports its scheme."""
    samples: Annotated[int, Field(ge=16, le=100_000)] = 300
    """Calibration samples, drawn from the training split only."""
    per_channel: bool = True
    """Whether each output channel of a weight has its own scale, instead of one for the tensor."""
    block_size: Annotated[int, Field(ge=16, le=1024)] = 32
    """Consecutive values of a weight that share one scale in `int4-weights`."""
    model_type: Literal["transformer"] | None = None
    """`transformer` adds SmoothQuant (Xiao et al. 2023) to `int8`, which moves outliers of activations into weights,
    and leaves the operators around attention and normalization in FP32."""
    epochs: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Epochs of quantization-aware training (Jacob et al. 2018, Keras only) before `int8`; 0 disables it. Zeros and
    clusters from earlier techniques are kept."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    """Peak of the one-cycle schedule of that training."""

    @model_validator(mode="before")
    @classmethod
    def _without_schemes(cls, value: object) -> object:
        """Earlier versions had a scheme for each recipe here; candidates that they made have an empty mapping."""
        if isinstance(value, Mapping) and "schemes" in value:
            if schemes := value["schemes"]:
                name, scheme = next(iter(schemes.items())) if isinstance(schemes, Mapping) else ("NAME", "SCHEME")
                raise ValueError(
                    "schemes: a recipe says its own scheme now: write "
                    f"`{name}: [{{quantize: {{scheme: {scheme}}}}}]` under recipes, and leave this out"
                )
            return {key: kept for key, kept in value.items() if key != "schemes"}
        return value

    @model_validator(mode="after")
    def _trains_for_int8(self) -> Self:
        if self.epochs and not SCHEMES[self.scheme].calibrated:
            raise ValueError(f"epochs: quantization-aware training is for scheme int8, not {self.scheme}; make it 0")
        return self

    def over(self, changes: Mapping[str, Any]) -> Self:
        """See Section. Training is only for INT8: a recipe with another scheme omits it."""
        scheme = SCHEMES.get(str(changes.get("scheme", self.scheme)))
        trained = scheme is None or scheme.calibrated
        return super().over(changes if trained else {"epochs": 0, **changes})


class Target(Section):
    """Engine, device and limits for which a candidate is built."""

    engine: str
    """Engine: `openvino`, `onnxruntime`, …; see docs/engines.md for all of them."""
    device: str = "CPU"
    """Device, in the engine's own notation."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    """Threads that one inference may use."""
    precision: Literal["f32", "f16", "bf16"] = "f32"
    """Precision of unquantized computation. Pinned, since OpenVINO otherwise selects BF16 automatically."""
    batch: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=3, max_length=3)] = (1, 1, 16)
    """Smallest, usual and largest batch size: the optimization profile of engines that have one."""
    lengths: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = ()
    """Length buckets for inputs of variable length: each batch is cut or padded to the smallest that holds it. By
    default, the length is that of the data."""
    options: dict[str, bool | int | float | str] = Field(default={})
    """The engine's own options (docs/engines.md); an unknown one is rejected before anything is trained."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; known: {', '.join(sorted(ENGINES))}")
        for name, values in (("batch", self.batch), ("lengths", self.lengths)):
            if list(values) != sorted(values):
                raise ValueError(f"{name} must grow, but is {list(values)}")
        return self


class Waiver(Section):
    """A person's approval despite a limit that could not be judged."""

    gate: Literal["latency", "p99_cap", "champion"]
    """The limit: `latency` (`objective.latency_p99_ms`), `p99_cap` (`guardrails.max_p99_ms`), or `champion`
    (`objective.max_drop_from_champion`, if the champion can no longer be run)."""
    by: Annotated[str, Field(min_length=2, max_length=100)]
    """Person who answers for it."""
    reason: Annotated[str, Field(min_length=10, max_length=300)]
    """Why the limit is known to hold, or does not need to."""
    until: datetime.date
    """Last day on which the waiver is valid."""


class Guardrails(Section):
    """Limits of the small-scale test and of the rollout. A certain breach stops them at once and restores the traffic;
    if the evidence stays inconclusive, nothing is released."""

    max_error_rate: Percent = 0.5
    """Largest excess of the challenger's share of failed requests over the champion's in the same windows, in
    percentage points (upper bound). Requests that no server answered are charged to neither."""
    max_disagreement: Percent = 10.0
    """Largest share of requests that champion and challenger answer differently, in percent (upper bound)."""
    max_accuracy_drop: Annotated[float, Field(gt=0, le=100)] = 3.0
    """Largest drop of the quality metric from the champion in the small-scale test, in percentage points (upper
    bound). Wider than `objective.max_drop`, which stage 1 judges on all samples: here only those of `shadow` count."""
    max_p99_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Largest ratio of the challenger's p99 latency to the champion's in the same windows (upper bound)."""
    max_p99_ms: Annotated[float, Field(gt=0)] = 250.0
    """Largest p99 of the challenger's latency, in milliseconds: in the small-scale test measured in its server, in the
    rollout by the client. If the champion breaches it too, or the machine is overloaded, it cannot be judged, and
    nothing is released without a waiver."""
    max_memory_mib: Annotated[int, Field(gt=0)] = 4096
    """Largest resident memory of the model server, in MiB."""
    max_memory_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Largest ratio of its memory to that of the champion's server, if it holds more than 512 MiB."""
    waivers: tuple[Waiver, ...] = ()
    """Limits that may stay undecided; the verdict, the registry's tags and the report name the person."""


class SmallScaleTest(Section):
    """Stage 2: the challenger runs alongside the champion, first in shadow, then with a small share of traffic."""

    shadow: Annotated[int, Field(ge=50, le=1_000_000)] = 2500
    """Requests mirrored to the challenger; the two answers are compared in pairs. While the evidence is inconclusive,
    the same number is repeated, up to four times in total."""
    share: Annotated[
        float,
        BeforeValidator(percent, json_schema_input_type=Annotated[float, Field(gt=0, le=50)] | str),
        Field(gt=0, le=50),
    ] = 5.0
    """Share of traffic that the challenger answers after the shadow phase, in percent."""
    requests: Annotated[int, Field(ge=50, le=10_000_000)] = 2000
    """Requests sent while the challenger has that share."""
    rate_per_s: Annotated[float, Field(gt=0, le=10_000)] = 100.0
    """Mean request rate; requests arrive at random (Poisson), like those of many independent users."""


class Rollout(Section):
    """Stage 3: the traffic moves step by step under guardrails, and the registry follows."""

    steps: Annotated[tuple[Annotated[int, Field(gt=0, le=100)], ...], Field(min_length=1)] = (25, 50, 100)
    """Shares of traffic in percent; the last is 100."""
    requests: Annotated[int, Field(ge=50, le=10_000_000)] = 1000
    """Requests observed at each step; at the last one, while the evidence is inconclusive, the same number is repeated
    up to three times. The champion then receives a copy of each, so that the two are still compared; on KServe, which
    cannot do this, the previous step is repeated."""
    rate_per_s: Annotated[float, Field(gt=0, le=10_000)] = 100.0
    """Mean request rate."""
    approval: bool = False
    """Whether a person must approve in the Airflow UI before the rollout starts."""

    @model_validator(mode="after")
    def _ends_at_all(self) -> Self:
        if list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != 100:
            raise ValueError(f"steps must grow and end at 100, but are {list(self.steps)}")
        return self
