"""A model that is exported with its normalizations has no more operations than one with Keras's layer."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

from bn_keras import BatchNormalization

layers = keras.layers
NETWORKS = {
    "dense": lambda norm: [keras.Input((8,)), layers.Dense(16), norm(), layers.ReLU(), layers.Dense(4)],
    "conv1d": lambda norm: [keras.Input((16, 3)), layers.Conv1D(8, 3, use_bias=False), norm(), layers.ReLU()],
    "conv2d": lambda norm: [
        keras.Input((16, 16, 3)),
        layers.Conv2D(8, 3, use_bias=False),
        norm(),
        layers.ReLU(),
        layers.DepthwiseConv2D(3),
        norm(),
        layers.ReLU(),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4),
    ],
    "conv3d": lambda norm: [keras.Input((6, 6, 6, 3)), layers.Conv3D(8, 3, use_bias=False), norm(), layers.ReLU()],
    "before a convolution": lambda norm: [keras.Input((16, 16, 3)), norm(), layers.ReLU(), layers.Conv2D(8, 3)],
}


@pytest.fixture(params=NETWORKS)
def models(request):
    """The network with our layer and with Keras's, of the same weights."""
    ours, theirs = (
        keras.Sequential(NETWORKS[request.param](norm)) for norm in (BatchNormalization, layers.BatchNormalization)
    )
    draw = np.random.default_rng(0)
    shapes = [weight.shape for weight in ours.weights]
    ours.set_weights([draw.uniform(0.5, 1.5, s) if len(s) == 1 else draw.normal(0, 0.3, s) for s in shapes])
    theirs.set_weights(ours.get_weights())
    return ours, theirs


def images(model, count):
    return np.random.default_rng(1).normal(size=(count, 1, *model.input_shape[1:])).astype("float32")


def tflite(model, int8):
    """The kinds of operations of the model as TensorFlow Lite has it, and its mean error."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([x] for x in images(model, 50))
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    errors = []
    for x in images(model, 20):
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        errors.append(np.abs(interpreter.get_tensor(wanted["index"]) - model(x, training=False)).mean())
    names = (each["op_name"] for each in interpreter._get_ops_details())
    return collections.Counter(name for name in names if name != "DELEGATE"), np.mean(errors)


@pytest.mark.parametrize("int8", [False, True])
def test_tflite_has_keras_operations_and_no_larger_error(models, int8):
    (ours, our_error), (theirs, their_error) = (tflite(model, int8) for model in models)
    assert ours == theirs
    assert our_error <= their_error + 1e-6


@pytest.mark.needs("onnx", "tf2onnx")
def test_onnx_has_no_more_operations_than_keras(models, tmp_path):
    import onnx

    counts = []
    for number, model in enumerate(models):
        model(images(model, 1)[0])  # Keras refuses a model that was never called
        model.export(tmp_path / f"{number}.onnx", format="onnx", verbose=False)
        counts.append(len(onnx.load(tmp_path / f"{number}.onnx").graph.node))
    assert counts[0] <= counts[1]
