"""Files of Keras 3 become networks of Keras 2 with the same answers, or are refused by the layer's name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slipstream.errors import ModelError
from slipstream.frameworks import keras_3, keras_files
from slipstream.frameworks.keras_runtime import keras as keras_2
from slipstream.frameworks.keras_training import outputs
from slipstream.tools.init.facts import Question
from slipstream.tools.init.inspect import reply_to

import keras  # isort: skip # Keras 3, after the settings of keras_runtime

L = keras.layers
Make = Callable[[], Any]


def images() -> Any:
    """Convolutions, a branch, and layers whose settings differ between the versions."""
    given = keras.Input((32, 32, 3))
    x = L.Rescaling(1 / 255)(L.RandomFlip()(given))
    x = L.Conv2D(8, 3, padding="same", use_bias=False, kernel_regularizer=keras.regularizers.L2(1e-4))(x)
    x = L.ReLU(max_value=6)(L.BatchNormalization()(x))
    x = L.Add()([x, L.Activation("swish")(L.DepthwiseConv2D(3, padding="same")(x))])
    x = L.SeparableConv2D(8, 3, activation="gelu")(L.MaxPooling2D()(x))
    x = L.LeakyReLU(0.1)(L.Conv2DTranspose(4, 3, strides=2)(L.UpSampling2D()(L.ZeroPadding2D(1)(x))))
    return keras.Model(given, L.Dense(5, activation="softmax")(L.Dropout(0.2)(L.GlobalAveragePooling2D()(x))))


def sequential() -> Any:
    return keras.Sequential([keras.Input((8, 8, 1)), L.Flatten(), L.LayerNormalization(), L.Dense(10)])


def nested() -> Any:
    """A model in a model, called twice: its weights are shared."""
    body = keras.Sequential([keras.Input((16,)), L.Dense(16, activation="relu"), L.Dense(16)], name="body")
    given = keras.Input((16,))
    return keras.Model(given, L.Dense(3)(body(body(given))))


def text() -> Any:
    given = keras.Input((12,), dtype="int32")
    x = L.Bidirectional(L.LSTM(8, return_sequences=True))(L.Embedding(50, 16)(given))
    return keras.Model(given, L.Dense(2)(L.GRU(4)(L.MultiHeadAttention(2, 8)(x, x))))


def normalized() -> Any:
    given, layer = keras.Input((8,)), L.Normalization()
    layer.adapt(np.random.default_rng(0).random((32, 8)))
    return keras.Model(given, L.Dense(2)(layer(given)))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", [images, sequential, nested, text, normalized])
def test_it_answers_as_before(make: Make, suffix: str, tmp_path: Path) -> None:
    theirs, path = make(), tmp_path / f"model{suffix}"
    rng = np.random.default_rng(1)
    for weight in theirs.weights:  # biases and statistics that are not 0 and 1
        if weight.dtype == "float32":
            weight.assign(weight + 0.1 * rng.random(weight.shape))
    theirs.save(path)
    theirs = keras.saving.load_model(path, compile=False)  # what depends on weights is made from the new ones
    network = keras_files.load(path, None)
    assert isinstance(network, keras_2.Model)
    ids = theirs.inputs[0].dtype == "int32"
    batch = rng.integers(0, 50, (6, 12)) if ids else rng.random((6, *theirs.input_shape[1:]))
    batch = batch.astype(theirs.inputs[0].dtype)
    np.testing.assert_allclose(outputs(network, batch), np.asarray(theirs(batch, training=False)), atol=1e-5)
    assert network.count_params() == theirs.count_params()
    network.save(tmp_path / "again.keras", save_format="keras")  # what a candidate is
    again = keras_files.load(tmp_path / "again.keras", None)
    np.testing.assert_allclose(outputs(again, batch), outputs(network, batch), atol=1e-5)


def test_regularizers_are_kept_for_the_training(tmp_path: Path) -> None:
    theirs = images()
    theirs.save(tmp_path / "model.keras")
    network = keras_files.load(tmp_path / "model.keras", None)
    assert len(network.losses) == len(theirs.losses) == 1
    assert float(network.losses[0]) == pytest.approx(float(theirs.losses[0]), rel=1e-5)


def test_init_looks_at_it(tmp_path: Path) -> None:
    images().save(tmp_path / "model.keras")
    facts = reply_to(Question(kind="keras", location=str(tmp_path / "model.keras"))).facts
    assert facts is not None
    assert (facts.input_shape, facts.input_dtype, facts.output_shape) == ((32, 32, 3), "float32", (5,))


@keras.saving.register_keras_serializable("mine")
class Doubled(L.Layer):
    def call(self, x: Any) -> Any:
        return 2 * x


def _after(layer: Callable[[Any], Any]) -> Any:
    given = keras.Input((8,))
    return keras.Model(given, L.Dense(2)(layer(L.Dense(8)(given))))


REFUSED: dict[str, tuple[Make, str]] = {
    "a Lambda layer": (lambda: _after(L.Lambda(lambda x: 2 * x)), r"holds Lambda 'lambda\w*'"),
    "a layer of one's own": (lambda: _after(Doubled(name="doubled")), "holds Doubled 'doubled'"),
    "an operation": (lambda: _after(lambda x: x + 1), r"layer 'add\w*' \(Add\) has no counterpart in Keras 2"),
    "a setting of Keras 3": (
        lambda: _after(L.LayerNormalization(rms_scaling=True, name="norm")),
        "layer 'norm' .* has rms_scaling=True, which Keras 2 does not know",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_keras_2_does_not_have_is_named(what: str, tmp_path: Path) -> None:
    make, said = REFUSED[what]
    make().save(tmp_path / "model.keras")
    with pytest.raises(ModelError, match=said + r".*; export the model with model.export\(\)"):
        keras_files.load(tmp_path / "model.keras", None)


def test_weights_alone_need_an_architecture(tmp_path: Path) -> None:
    sequential().save_weights(tmp_path / "only.weights.h5")
    with pytest.raises(ModelError, match=r"holds weights alone.*model\.architecture"):
        keras_files.load(tmp_path / "only.weights.h5", None)


def test_another_answer_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose meaning changed between the versions would show here."""
    given = keras.Input((8,))
    keras.Model(given, L.Dense(2, activation="tanh")(given)).save(tmp_path / "model.keras")
    plain = keras_3._plain
    monkeypatch.setattr(keras_3, "_plain", lambda value: "relu" if value == "tanh" else plain(value))
    with pytest.raises(ModelError, match="converted to Keras 2, with the same weights, it differs by up to"):
        keras_files.load(tmp_path / "model.keras", None)
