"""Keras networks for the tests; made inside functions, as users do."""

from typing import Any


def squares() -> Any:
    """8×8×1 images to four logits, with batch norm, dropout, and a second convolution whose inputs come in fours."""
    import tensorflow as tf

    layers = tf.keras.layers
    images = values = layers.Input((8, 8, 1), name="input")
    for channels in (8, 16):
        values = layers.Conv2D(channels, 3, padding="same", use_bias=False)(values)
        values = layers.BatchNormalization()(values)
        values = layers.ReLU()(values)
    values = layers.Dropout(0.2)(layers.Flatten()(layers.MaxPooling2D(4)(values)))
    return tf.keras.Model(images, layers.Dense(4)(values))


def train(training: Any, epochs: int) -> Any:
    """The train function of the steps' tests, for Fashion-MNIST."""
    import tensorflow as tf

    layers = tf.keras.layers
    images = values = layers.Input((28, 28, 1), name="input")
    for channels in (8, 16):
        values = layers.Conv2D(channels, 3, 2, padding="same", use_bias=False)(values)
        values = layers.ReLU()(layers.BatchNormalization(momentum=0.8)(values))
    network = tf.keras.Model(images, layers.Dense(10)(layers.Flatten()(values)))
    training.fit(network, epochs=epochs, learning_rate=0.05)
    return network


def probabilities() -> Any:
    """A sequence that ends in softmax, as most Keras classifiers do."""
    import tensorflow as tf

    layers = tf.keras.layers
    return tf.keras.Sequential(
        [layers.Input((8, 8, 1)), layers.Flatten(), layers.Dense(16, "relu"), layers.Dense(4, "softmax")]
    )


def maps() -> Any:
    """8×8×1 images to 2×4×8, maps of two classes: the classes first, as the metric takes them."""
    import tensorflow as tf

    layers = tf.keras.layers
    images = layers.Input((8, 8, 1))
    values = layers.Conv2D(8, 3, (2, 1), padding="same", activation="relu")(images)
    return tf.keras.Model(images, layers.Permute((3, 1, 2))(layers.Conv2D(2, 1)(values)))


def unknown_layer() -> Any:
    """A layer of the user's own, which tensorflow-model-optimization cannot round."""
    import tensorflow as tf

    class Twice(tf.keras.layers.Layer):  # type: ignore[misc] # Keras has no types
        def call(self, values: Any) -> Any:
            return 2 * values

    layers = tf.keras.layers
    images = layers.Input((8, 8, 1))
    return tf.keras.Model(images, layers.Dense(4)(Twice()(layers.Flatten()(images))))


def keras_3() -> Any:
    """What Keras 3 makes."""
    import keras

    return keras.Sequential([keras.layers.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(4)])


def same_as_keras_3(activation: str | None = None) -> Any:
    """The same network in Keras 2, or one with another activation."""
    import tensorflow as tf

    layers = tf.keras.layers
    return tf.keras.Sequential([layers.Input((8, 8, 1)), layers.Flatten(), layers.Dense(4, activation)])


def not_a_network() -> str:
    return "network"
