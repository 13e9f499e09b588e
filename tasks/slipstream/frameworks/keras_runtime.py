"""TensorFlow and Keras 2, as all modules here import them: in one place, since the settings must come first.

tensorflow-model-optimization knows Keras 2 only, which goes on as the package tf-keras; with TF_USE_LEGACY_KERAS=1
`tf.keras` in the user's code is that one too.
"""

import os

os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when `tf.keras` is first used
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # its start-up otherwise lists the GPUs that are not there

import tensorflow as tf
import tf_keras as keras

# Dropout then keeps its state in a variable that can be set, and not in a kernel: a resumed training sees the same.
keras.backend.experimental.enable_tf_random_generator()

__all__ = ["keras", "tf"]
