"""Facts about a model, passed as JSON from the process that inspected it."""

from slipstream.contract import Document


class Facts(Document):
    """Facts about a model that can be known without data."""

    framework: str
    input_shape: tuple[int, ...] | None = None
    """One sample, without the batch; -1 where it varies. None if only the data could tell."""
    input_dtype: str | None = None
    output_shape: tuple[int, ...] | None = None
    parameters: int
    layers: dict[str, int]
    """Number of operators of a graph, or layers of a network, by kind."""
    notes: tuple[str, ...] = ()

    @property
    def transformer(self) -> bool:
        """Whether it has attention: by name, or as products of matrices on both sides of a softmax."""
        has_attention_layer = any("Attention" in kind for kind in self.layers)
        return has_attention_layer or self.layers.get("MatMul", 0) >= 4 * self.layers.get("Softmax", 0) > 0

    @property
    def reads_tokens(self) -> bool:
        """Whether its input is token ids: (N, T) whole numbers."""
        return self.input_dtype == "int64" and self.input_shape is not None and len(self.input_shape) == 1

    @property
    def quantized(self) -> bool:
        """Whether it has been quantized before."""
        return any(kind.startswith(("QuantizeLinear", "DynamicQuantize", "QLinear")) for kind in self.layers)


class Question(Document):
    """What the other process must inspect."""

    kind: str
    location: str
    """Path, or the function that builds the network as module:function."""
    weights: str | None = None
    """A safetensors file that is loaded into that network."""
    data: str | None = None
    """The data function, or a split's .npz file."""
    framework: str = "torch"


class Reply(Document):
    """Facts, or why there are none."""

    facts: Facts | None = None
    error: str | None = None
