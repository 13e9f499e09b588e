"""Sections that say how much of a machine or a cluster the steps may use. docs/spec.md is made of their docstrings."""

from typing import Annotated, Literal

from pydantic import Field

from slipstream.contract import Section
from slipstream.spec.fields import MEMORY


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

    def on_top_of(self, base: "Resources") -> "Resources":
        """These, and what they leave out from `base`."""
        return Resources(**(base.model_dump(exclude_none=True) | self.model_dump(exclude_none=True)))
