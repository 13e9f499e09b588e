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
    trains: bool = True
    """Whether its models can be trained; if not, its module is a Framework, but no Trainer."""
    keeps: tuple[str, ...] = ()
    """Files and folders of a candidate that stay beside its quantized ONNX form, with the calibration samples: for
    engines that convert from them."""
    prune_methods: tuple[str, ...] = ("channels",)
    """Values of `prune.method` that it has."""
    quantization_aware: bool = False
    """Whether it trains with rounded weights (`quantize.epochs`)."""
    distributed: bool = False
    """Whether several processes can train together (`training.workers`)."""


FRAMEWORKS: dict[str, FrameworkInfo] = {
    "keras": FrameworkInfo(
        "slipstream.frameworks.keras",
        "tensorflow",
        ("distill", "prune", "cluster", "quantize"),
        ("tensorflow", "tf-keras", "tensorflow-model-optimization", "tf2onnx", "onnx", "onnxruntime", "numpy"),
        keeps=("saved_model",),
        prune_methods=("magnitude", "2:4"),
        quantization_aware=True,
    ),
    "onnx": FrameworkInfo(
        "slipstream.frameworks.onnx",
        "torch",
        ("simplify", "quantize"),
        ("onnx", "onnxruntime", "numpy"),
        trains=False,
    ),
    "torch": FrameworkInfo(
        "slipstream.frameworks.torch",
        "torch",
        ("distill", "prune", "simplify", "quantize"),
        ("torch", "torch-pruning", "safetensors", "onnx", "onnxruntime", "numpy"),
        distributed=True,
    ),
}
"""Spec name → what is known of it."""
