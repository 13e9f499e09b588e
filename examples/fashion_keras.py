"""The Keras example: a small network on Fashion-MNIST, whose images come from examples/fashion.py.

The networks are made inside functions, since the model servers load `data` where there is no TensorFlow.
"""

import numpy as np
from examples import fashion

from slipstream import Data, Split


def data(limit=None):
    """60,000 training and 10,000 test images as Keras takes them: (N, 28, 28, 1)."""
    given = fashion.data(limit)
    return Data(train=_channels_last(given.train), test=_channels_last(given.test), classes=given.classes)


def cnn():
    """Five convolutions, 16 to 64 channels: 36,000 parameters."""
    return _cnn(width=16)


def student():
    """Half as wide."""
    return _cnn(width=8)


def train(training, epochs=4):
    """Train the baseline."""
    network = cnn()
    training.fit(network, epochs=epochs, learning_rate=0.1, batch_size=128)
    return network


def _cnn(width):
    import tensorflow as tf

    layers = tf.keras.layers
    inputs = values = layers.Input((28, 28, 1), name="input")
    for channels, stride in ((width, 2), (width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2)):
        values = layers.Conv2D(channels, 3, stride, padding="same", use_bias=False)(values)
        values = layers.BatchNormalization(momentum=0.9)(values)
        values = layers.ReLU()(values)
    values = layers.Dropout(0.1)(layers.GlobalAveragePooling2D()(values))
    return tf.keras.Model(inputs, layers.Dense(len(fashion.CLASSES))(values))


def _channels_last(split):
    return Split(np.ascontiguousarray(split.inputs.transpose(0, 2, 3, 1)), split.labels)
