"""Frameworks: what a trained model was made with. One module each, found by its name here.

Nothing is imported until it is used; a step that only finds its earlier result does not load the framework.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class FrameworkInfo:
    """What the rest knows of a framework without loading it."""

    module: str
    environment: str
    """Environment (containers/NAME) of the steps that work on its models."""
    techniques: tuple[str, ...]
    """Techniques that it has; a spec that asks for another is refused."""
    distributions: tuple[str, ...]
    """PyPI distributions whose versions belong to the identity of what it makes."""


FRAMEWORKS: dict[str, FrameworkInfo] = {
    "torch": FrameworkInfo(
        "slipstream.frameworks.torch",
        "torch",
        ("distill", "prune", "quantize"),
        ("torch", "torch-pruning", "safetensors", "onnx", "onnxruntime", "numpy"),
    ),
}
"""Spec name → what is known of it."""
