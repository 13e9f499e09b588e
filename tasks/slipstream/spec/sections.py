"""The sections of a spec. Their docstrings are the reference in docs/spec.md."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from slipstream.engines import ENGINES
from slipstream.frameworks import FRAMEWORKS
from slipstream.spec.fields import MEMORY, REGISTRY, FileUri, Percent, Section, UserFunction, percent


class Model(Section):
    """Where the trained model comes from."""

    registry: Annotated[str, Field(pattern=REGISTRY)]
    """Registered model and alias, such as `models:/fashion-resnet@source`. Moving the alias starts a run."""
    framework: str = "torch"
    """Framework of the trained model."""
    architecture: UserFunction | None = None
    """Builds the untrained network; weights are loaded into it, so that nothing is ever unpickled. Needed unless the
    model's own file says what it computes, as ONNX does."""
    file: FileUri | None = None
    """A trained model's file, local path or s3:// URI, to start from: each run registers it, unless it is registered
    already, and moves the alias to it."""
    train: UserFunction | None = None
    """Trains the model. Scheduled runs retrain with it; without it every run starts from the registry."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.framework not in FRAMEWORKS:
            raise ValueError(f"unknown framework {self.framework!r}; known: {', '.join(sorted(FRAMEWORKS))}")
        if self.framework == "torch" and self.architecture is None:
            raise ValueError("architecture is missing: name the function that builds the network, as module:function")
        if self.file is not None and self.train is not None:
            raise ValueError("file and train cannot both be where the model comes from; leave one out")
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

    scheme: Literal["int8", "int8-dynamic", "int8-weights", "int4-weights"] = "int8"
    """Number format: `int8` for weights and activations, with ranges from calibration; `int8-dynamic` with ranges
    found anew for each input; `int8-weights` and `int4-weights` for weights alone, which saves memory."""
    samples: Annotated[int, Field(ge=16, le=100_000)] = 300
    """Calibration samples, drawn from the training split only."""
    per_channel: bool = True
    """One scale for each output channel of a weight, instead of one for the tensor."""


class Target(Section):
    """Where an engine runs."""

    engine: str
    """Engine: `openvino`, `onnxruntime`, …; docs/engines.md has them all."""
    device: str = "CPU"
    """Device in the engine's own words."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 2
    """Threads that one inference may use."""
    precision: Literal["f32", "f16", "bf16"] = "f32"
    """Precision of what is not quantized. Pinned, since OpenVINO otherwise picks BF16 by itself."""
    batch: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=3, max_length=3)] = (1, 1, 16)
    """Least, usual and greatest batch size: the optimisation profile of engines that have one."""
    lengths: tuple[Annotated[int, Field(ge=1, le=100_000)], ...] = ()
    """Length buckets of inputs of varying length: each batch is cut or padded to the least that holds it. None is the
    length that the data has."""
    options: dict[str, bool | int | float | str] = Field(default={})
    """The engine's own options (docs/engines.md); an unknown one is refused before anything is trained."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; known: {', '.join(sorted(ENGINES))}")
        for name, values in (("batch", self.batch), ("lengths", self.lengths)):
            if list(values) != sorted(values):
                raise ValueError(f"{name} must grow, but is {list(values)}")
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
        BeforeValidator(percent, json_schema_input_type=Annotated[float, Field(gt=0, le=50)] | str),
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


class Training(Section):
    """How training steps (retrain, distill, prune's fine-tuning) are spread."""

    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that share each batch (PyTorch DDP). On one machine they run side by side; on Kubernetes each is a
    pod, and together they are a Kubeflow Trainer job."""


class Toleration(Section):
    """Kubernetes toleration: lets a pod run on nodes that a taint keeps others from."""

    key: str | None = None
    """Key of the taint; none matches every taint."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Whether the value must be equal, or the key only be there."""
    value: str | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; none matches every effect."""


class Resources(Section):
    """What a step may use, where it runs, and in which image. What is left out comes from the settings."""

    cpu: Annotated[float, Field(gt=0, le=1024)] | None = None
    """Processor cores: what Kubernetes reserves; a limit in Docker."""
    memory: Annotated[str, Field(pattern=MEMORY)] | None = None
    """Memory such as `4Gi`; a step that exceeds it is killed, and says so."""
    gpu: Annotated[int, Field(ge=0, le=64)] | None = None
    """Number of NVIDIA GPUs."""
    node_selector: dict[str, str] | None = None
    """Labels that the node must have (Kubernetes)."""
    tolerations: tuple[Toleration, ...] | None = None
    """Taints that the step tolerates (Kubernetes)."""
    image: str | None = None
    """Image to run instead of the one of the step's environment."""

    def over(self, base: "Resources") -> "Resources":
        """These, and what they leave out from `base`."""
        return Resources(**(base.model_dump(exclude_none=True) | self.model_dump(exclude_none=True)))
