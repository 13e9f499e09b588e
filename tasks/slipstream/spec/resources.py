"""Sections that limit what steps may use of a machine or a cluster. Their docstrings become docs/spec.md."""

from typing import Annotated, Literal

from pydantic import Field

from slipstream.contract import Section
from slipstream.spec.fields import MEMORY


class Training(Section):
    """Distribution of training steps (retrain, distill, prune's fine-tuning) over processes."""

    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that share each batch (PyTorch DDP). On one machine they run in parallel; on Kubernetes each is a
    pod, and together they form a Kubeflow Trainer job."""


class Toleration(Section):
    """Kubernetes toleration, which admits a pod to nodes with a matching taint."""

    key: str | None = None
    """Key of the taint; by default, every taint matches."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Whether the value must be equal, or the key must only exist."""
    value: str | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; by default, every effect matches."""


class Resources(Section):
    """What a step may use, where it runs, and in which image. Omitted keys come from the settings."""

    cpu: Annotated[float, Field(gt=0, le=1024)] | None = None
    """Processor cores: what Kubernetes reserves; a limit in Docker."""
    memory: Annotated[str, Field(pattern=MEMORY)] | None = None
    """Memory such as `4Gi`; a step that exceeds it is killed, and the error says so."""
    gpu: Annotated[int, Field(ge=0, le=64)] | None = None
    """Number of NVIDIA GPUs."""
    node_selector: dict[str, str] | None = None
    """Labels that the node must have (Kubernetes)."""
    tolerations: tuple[Toleration, ...] | None = None
    """Taints that the step tolerates (Kubernetes)."""
    image: str | None = None
    """Image to run instead of the default of the step's environment."""

    def on_top_of(self, base: "Resources") -> "Resources":
        """Return these resources, with omitted keys from `base`."""
        return Resources(**(base.model_dump(exclude_none=True) | self.model_dump(exclude_none=True)))
