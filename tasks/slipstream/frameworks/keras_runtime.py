"""TensorFlow and Keras 2, imported in one place by all modules here, since the settings must come first.

tensorflow-model-optimization supports only Keras 2, which is maintained as the package tf-keras; with
TF_USE_LEGACY_KERAS=1, `tf.keras` in the user's code is that one too.
"""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when `tf.keras` is first used
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # otherwise, start-up lists missing GPUs

import tensorflow as tf
import tf_keras as keras

# Dropout then keeps its state in a variable that can be set, and not in a kernel, so a resumed training repeats it.
keras.backend.experimental.enable_tf_random_generator()

__all__ = ["keras", "tf"]
