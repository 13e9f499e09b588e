"""Converts Keras 3 files to Keras 2 networks, which tensorflow-model-optimization can train.

Keras 3 reads the file (no code in it is run: custom objects and Lambda layers are rejected), its graph is traversed,
and each layer is rebuilt from its settings with the same weights. A layer without counterpart in Keras 2 is rejected by
name, and the result is accepted only if both networks give the same answers.
"""

import inspect
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np

from slipstream.contract.arrays import Array
from slipstream.errors import ModelError
from slipstream.frameworks.keras_runtime import keras
from slipstream.frameworks.keras_training import outputs
from slipstream.onnx.agreement.bounds import EXACT, explain_mismatch

if TYPE_CHECKING:  # slow to import; `read` imports it for a file that needs it
    import keras as keras_3

Keras3Layer: TypeAlias = "keras_3.Layer"
"""A layer of Keras 3; its models are layers too."""

INSTEAD = "export the model with model.export() and name that folder, or name a function that builds it with tf.keras"
"""Alternatives that always work: a SavedModel gives answers, but cannot be trained; a Keras 2 network can."""
SETTINGS_OF_TRAINING = {"quantization_config", "lora_rank", "lora_alpha"}
"""Keras 3 settings that change no answer of a network read from a file."""
HOW_IT_IS_MADE = ("module", "registered_name", "build_config")
"""Keys of an object's description that Keras 2 does not need."""
RENAMED = {("LeakyReLU", "negative_slope"): "alpha"}
"""Name of a setting in Keras 2, by layer and setting."""
ADDED = {"MultiHeadAttention": {"query_shape": None, "key_shape": None, "value_shape": None}}
"""Settings that only Keras 2 writes and reads: shapes that are not known before the layer is called."""
NAMED = 5


def convert(path: Path) -> keras.Model:
    """Return the network of a .keras or .h5 file that Keras 3 wrote. Raise ModelError."""
    _require_plain(path)
    theirs = read(path)
    if not hasattr(theirs, "_run_through_graph") and not hasattr(theirs, "layers"):
        raise ModelError(f"{path.name}: holds a {type(theirs).__name__}, which has no graph of layers; {INSTEAD}")
    network = _Conversion(path.name).network(theirs)
    require_equal(path, theirs, network, "converted to Keras 2")
    return network


def read(path: Path) -> Keras3Layer:
    """Return the model as Keras 3 reads it. Raise ModelError."""
    import keras as keras_3

    try:
        return keras_3.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras and h5py share no root but Exception
        reason = next(iter(str(error).splitlines()), "")
        raise ModelError(f"{path.name}: Keras 3 cannot read it: {type(error).__name__}: {reason}") from error


def require_equal(path: Path, theirs: Keras3Layer, network: keras.Model, what: str) -> None:
    """Raise ModelError unless both give the same answers to two random samples."""
    shape = [2, *(size or 8 for size in network.input_shape[1:])]
    dtype = network.inputs[0].dtype.as_numpy_dtype
    sample = _sample(theirs, shape, np.dtype(dtype))
    problem = explain_mismatch(np.asarray(theirs(sample, training=False)), outputs(network, sample), EXACT)
    if problem is not None:
        raise ModelError(f"{path.name}: {what}, with the same weights, it {problem}; {INSTEAD}")


def _sample(theirs: Keras3Layer, shape: list[int], dtype: np.dtype[np.generic]) -> Array:
    """Return random inputs; ids that every embedding has, whatever their dtype."""
    rng = np.random.default_rng(0)
    ids = [layer.input_dim for layer in theirs._flatten_layers() if type(layer).__name__ == "Embedding"]
    if ids or np.issubdtype(dtype, np.integer):
        return rng.integers(0, min([*ids, 256]), shape).astype(dtype)
    return rng.normal(size=shape).astype(dtype)


def _require_plain(path: Path) -> None:
    """Raise ModelError if the file names code: a Lambda layer, or a class that is not Keras's own."""
    strangers = list(dict.fromkeys(_strangers(_config(path))))
    if strangers:
        raise ModelError(
            f"{path.name}: holds {', '.join(strangers[:NAMED])}, whose code is not in the file or would be run from "
            f"it; {INSTEAD}"
        )


def _config(path: Path) -> object:
    """Return the network's description. Raise ModelError for a file that contains only weights."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                return json.loads(file.read("config.json"))
        with h5py.File(path) as file:
            return json.loads(file.attrs["model_config"])
    except KeyError:
        raise ModelError(
            f"{path.name}: holds weights alone; name the function that builds the network, with layers of tf.keras, "
            "under model.architecture"
        ) from None


def _strangers(config: object) -> Iterator[str]:
    """Yield third-party classes in a description."""
    if isinstance(config, Mapping):
        name, module = config.get("class_name"), config.get("module") or "keras"
        if name is not None and (
            name == "Lambda" or config.get("registered_name") not in (None, name) or not _is_keras(str(module))
        ):
            yield f"{name} {dict(config.get('config') or {}).get('name', '')!r}" if name != "function" else str(config)
        for value in config.values():
            yield from _strangers(value)
    elif isinstance(config, list):
        for value in config:
            yield from _strangers(value)


def _is_keras(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in ("keras", "builtins")


class _Conversion:
    """The conversion of one file; a layer that is used twice is built once."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.made: dict[int, tuple[Keras3Layer, keras.layers.Layer]] = {}

    def network(self, theirs: Keras3Layer) -> keras.Model:
        """Return a Keras 2 model with the layers, graph and weights of a Keras 3 model."""
        functional = getattr(theirs, "_functional", None) or theirs  # the content of a Sequential
        if not hasattr(functional, "_run_through_graph"):
            raise self._refused(theirs, "is written as a class, which Keras 2 does not have")
        inputs = [keras.Input(shape=x.shape[1:], dtype=x.dtype, name=x.name) for x in functional.inputs]
        answers = functional._run_through_graph(inputs, operation_fn=self._layer, call_fn=self._call)
        return keras.Model(inputs if len(inputs) > 1 else inputs[0], answers, name=theirs.name)

    def _layer(self, theirs: Keras3Layer) -> tuple[Keras3Layer, keras.layers.Layer]:
        """Return the counterpart of a layer, or of a model used as one, and its settings."""
        if id(theirs) not in self.made:
            nested = hasattr(theirs, "_run_through_graph") or hasattr(theirs, "_functional")
            self.made[id(theirs)] = (theirs, self.network(theirs) if nested else self._single(theirs))
        return self.made[id(theirs)]

    def _call(self, pair: tuple[Keras3Layer, keras.layers.Layer], *arguments: object, **keywords: object) -> object:
        """Call a counterpart in the graph, which creates its weights."""
        theirs, layer = pair
        used = {name: value for name, value in keywords.items() if value is not None}
        try:
            answer = layer(*arguments, **used)
        except (TypeError, ValueError) as error:
            raise self._refused(theirs, f"is not called like that in Keras 2 ({error})") from error
        if not isinstance(layer, keras.Model):
            source_weights, own = theirs.get_weights(), layer.get_weights()
            if [w.shape for w in source_weights] != [w.shape for w in own]:
                shapes = [[w.shape for w in weights] for weights in (source_weights, own)]
                raise self._refused(theirs, f"has weights {shapes[0]}, where Keras 2 has {shapes[1]}")
            layer.set_weights(source_weights)
        return answer

    def _single(self, theirs: Keras3Layer) -> keras.layers.Layer:
        kind = type(theirs).__name__
        own = getattr(keras.layers, kind, None)
        if (
            own is None
            or not hasattr(theirs, "get_config")
            or not type(theirs).__module__.startswith("keras.src.layers")
        ):
            raise self._refused(theirs, "has no counterpart in Keras 2")
        config = self._settings(theirs, own)
        try:
            return keras.layers.deserialize({"class_name": kind, "config": config})
        except (TypeError, ValueError, KeyError) as error:
            raise self._refused(theirs, f"cannot be made in Keras 2 ({error})") from error

    def _settings(self, theirs: Keras3Layer, own: type[keras.layers.Layer]) -> dict[str, object]:
        """Return a layer's settings without those unknown to Keras 2, which must have their default value."""
        kind = type(theirs).__name__
        config = {RENAMED.get((kind, k), k): v for k, v in _plain(theirs.get_config()).items()}
        supported = {"name", "trainable", "dtype", *_parameters(own)}
        defaults = _parameters(type(theirs))
        for name in set(config) - supported:
            value = config.pop(name)
            if name not in SETTINGS_OF_TRAINING and value not in (None, False, "channels_last", defaults.get(name)):
                raise self._refused(theirs, f"has {name}={value!r}, which Keras 2 does not know")
        return config | ADDED.get(kind, {})

    def _refused(self, theirs: Keras3Layer, why: str) -> ModelError:
        return ModelError(f"{self.file}: layer {theirs.name!r} ({type(theirs).__name__}) {why}; {INSTEAD}")


def _parameters(kind: Any) -> dict[str, object]:
    """Return the parameters of a class and its bases, with their defaults."""
    defaults: dict[str, object] = {}
    for base in reversed(kind.__mro__[:-1]):
        for name, parameter in inspect.signature(base.__init__).parameters.items():
            defaults[name] = parameter.default
    return defaults


def _plain(value: Any) -> Any:
    """Return a setting as Keras 2 writes it: a precision or a function by name, nested settings likewise.

    Initializers are left out, since their settings differ and the weights are given.
    """
    if isinstance(value, Mapping):
        if value.get("class_name") == "DTypePolicy":
            return value["config"]["name"]
        if value.get("class_name") == "function":
            return value["config"]
        return {k: _plain(v) for k, v in value.items() if k not in HOW_IT_IS_MADE and "initializer" not in k}
    if isinstance(value, list | tuple):
        return type(value)(_plain(v) for v in value)
    return value
