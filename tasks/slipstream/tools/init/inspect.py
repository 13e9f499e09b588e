"""Inspects a model with its framework, as a process.

It runs in the framework's environment, so that the command itself needs none. Models are read as in the steps: what the
steps would reject is rejected here.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.contract.arrays import Array
from slipstream.contract.ask import answer
from slipstream.data.user_code import user_function
from slipstream.errors import DataError, ModelError, SlipstreamError
from slipstream.frameworks.base import Network, trainer_for
from slipstream.spec import Call
from slipstream.tools.init.facts import Facts, Question, Reply
from slipstream.tools.init.source import NPZ


def onnx_file(question: Question) -> Facts:
    """Inspect an ONNX file, or a folder with one and its weights."""
    from slipstream.frameworks.onnx import FRAMEWORK
    from slipstream.onnx import graph as onnx_graph

    network = FRAMEWORK.load_weights(FRAMEWORK.find_model(Path(question.location)), None)
    model = network.model
    notes = []
    if network.fixed is not None:
        notes.append(f"the file has a batch of {network.batch} only; it is made dynamic, and tried on your samples")
    return Facts(
        framework="onnx",
        input_shape=onnx_graph.dimensions(model.graph.input[0])[1:],
        input_dtype=onnx_graph.dtype(model.graph.input[0]),
        output_shape=onnx_graph.dimensions(model.graph.output[0])[1:],
        parameters=onnx_graph.parameters(model),
        layers=dict(Counter(node.op_type for node in onnx_graph.nodes(model))),
        notes=tuple(notes),
    )


def keras_file(question: Question) -> Facts:
    """Inspect a .keras or .h5 file, or a SavedModel's folder."""
    from slipstream.frameworks import keras_files

    path = Path(question.location)
    network = keras_files.load(keras_files.find(path) if path.is_dir() else path, None)
    if isinstance(network, keras_files.Served):
        function = network._function
        input_tensor, output_tensor = next(iter(function.structured_input_signature[1].values())), function.outputs[0]
        layers = Counter(operation.type for operation in function.graph.get_operations())
        parameters = sum(int(v.shape.num_elements() or 0) for v in network.variables)
    else:
        input_tensor, output_tensor = network.inputs[0], network.outputs[0]
        layers = Counter(type(layer).__name__ for layer in network.layers)
        parameters = network.count_params()
    return Facts(
        framework="keras",
        input_shape=_dimensions(input_tensor.shape),
        input_dtype=input_tensor.dtype.name,
        output_shape=_dimensions(output_tensor.shape),
        parameters=parameters,
        layers=dict(layers),
    )


def _dimensions(shape: Any) -> tuple[int, ...]:
    """Return one sample's shape from TensorFlow's (batch, …); -1 where it varies."""
    return tuple(-1 if size is None else int(size) for size in shape.as_list()[1:])


def function(question: Question) -> Facts:
    """Return facts of a function that builds a network, with its weights; its shapes are known only with data."""
    call, trainer = Call(function=question.location), trainer_for(question.framework)
    network: Any  # either framework's own
    if question.weights is None:
        network = trainer.build(call, seed=0)
    else:
        network = trainer.load_weights(trainer.find_model(Path(question.weights)), call)
    if question.framework == "keras":
        layers = Counter(type(layer).__name__ for layer in network.layers)
        parameters = network.count_params()
    else:
        layers = Counter(type(m).__name__ for m in network.modules() if not list(m.children()))
        parameters = sum(p.numel() for p in network.parameters())
    facts = Facts(framework=question.framework, parameters=parameters, layers=dict(layers))
    return facts if question.data is None else _tried(facts, network, question.data)


def _tried(facts: Facts, network: Network, data: str) -> Facts:
    """Return the facts, with the shapes that the network has on two samples of the data."""
    inputs = _samples(data)
    try:
        outputs = trainer_for(facts.framework).logits(network, inputs)
    except Exception as error:  # the user's network may raise anything
        raise ModelError(
            f"the network does not take the data of {data} ({inputs.shape[1:]} {inputs.dtype}): "
            f"{type(error).__name__}: {error}"
        ) from error
    shapes = {"input_shape": inputs.shape[1:], "input_dtype": str(inputs.dtype), "output_shape": outputs.shape[1:]}
    return facts.model_copy(update=shapes)


def _samples(data: str) -> Array:
    """Return two inputs of the training split. Raise DataError."""
    if not data.endswith(NPZ):
        inputs: Array = user_function(Call(function=data))().train.inputs[:2]
        return inputs
    try:
        with np.load(data, allow_pickle=False) as arrays:
            return np.asarray(arrays["inputs"][:2])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{data}: not an .npz file with arrays `inputs` and `labels`: {error}") from error


KINDS: dict[str, Callable[[Question], Facts]] = {"onnx": onnx_file, "keras": keras_file, "function": function}


def reply_to(question: Question) -> Reply:
    """Return facts, or what is wrong with the model."""
    try:
        return Reply(facts=KINDS[question.kind](question))
    except SlipstreamError as error:
        return Reply(error=str(error))


if __name__ == "__main__":
    answer(Question, reply_to)
