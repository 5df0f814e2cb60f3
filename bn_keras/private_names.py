"""The private names of Keras and TensorFlow that this package needs. No other module uses any.

tests/test_private_names.py tests each, and says what breaks if a new version changes it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.models.functional import Functional
from keras.src.saving.serialization_lib import SafeModeScope

__all__ = ["Functional", "SafeModeScope"]


def functional_of(sequential: keras.Sequential) -> keras.Model | None:
    """The functional model that a built Sequential model runs; None before it is built."""
    return sequential._functional


def calls_by_depth(functional: keras.Model) -> dict[int, list[Any]]:
    """{depth: calls} of a functional model, the calls nearest to the outputs at depth 0."""
    return functional._nodes_by_depth


def operation_before(tensor: keras.KerasTensor) -> Any:
    """The layer or operation whose call made a symbolic tensor."""
    return tensor._keras_history.operation


def mask_of(tensor: keras.KerasTensor) -> Any:
    """The mask that a symbolic tensor carries, which Keras gives to the calls that read it; or None."""
    return getattr(tensor, "_keras_mask", None)


def layers_within(layer: keras.Layer) -> list[keras.Layer]:
    """A layer and the layers inside of it, of any depth."""
    return layer._flatten_layers()


def outside_graphs(operation: Any) -> Any:
    """A copy of an operation that shares all its state, but is part of no graph yet."""
    twin = object.__new__(type(operation))
    vars(twin).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return twin


def without_dropout_preparation(rnn: keras.layers.RNN) -> Callable[[], object]:
    """Stops an RNN from preparing dropout, which calls stacked cells once more; returns a function that undoes this."""
    vars(rnn)["_maybe_config_dropout_masks"] = lambda cell, inputs, states: None
    return lambda: vars(rnn).pop("_maybe_config_dropout_masks")


def compiled_by_xla() -> bool:
    """Whether TensorFlow is tracing a function that XLA will compile."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    if tf.executing_eagerly():
        return False
    return control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph())


def graph_of_its_own(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `tf.function`, without AutoGraph, that is not merged into the graph that calls it, such as a loop's.

    oneDNN's pass over a graph replaces the gradient of a max pooling only if it has come to the pooling before. It goes
    from inputs to outputs, but a loop's graph has cycles, where the order differs from trace to trace: in 2 of 5 traces
    of a training loop of an earlier layer on two devices, one gradient was left to another kernel.
    """
    import tensorflow as tf

    function = tf.autograph.experimental.do_not_convert(function)
    return tf.function(function, experimental_attributes={"_noinline": True})


@contextlib.contextmanager
def new_layer_names() -> Iterator[None]:
    """In a `with` block, Keras numbers layers from 1 again, so that a network built again has the same names."""
    names = global_state.get_global_attribute("object_name_uids")
    global_state.set_global_attribute("object_name_uids", None)
    try:
        yield
    finally:
        global_state.set_global_attribute("object_name_uids", names)


@contextlib.contextmanager
def seeds_put_back() -> Iterator[None]:
    """After a `with` block, Keras and TensorFlow draw the random numbers that they would have drawn without it."""
    from tensorflow.python.eager import context

    of_keras = ("global_random_seed", "global_seed_generator")
    before = {name: global_state.get_global_attribute(name) for name in of_keras}
    tensorflow = vars(context.context())
    before_of_tensorflow = {name: tensorflow[name] for name in ("_seed", "_rng") if name in tensorflow}
    try:
        yield
    finally:
        for name, value in before.items():
            global_state.set_global_attribute(name, value)
        tensorflow.update(before_of_tensorflow)


@contextlib.contextmanager
def same_bits_each_time() -> Iterator[None]:
    """In a `with` block, TensorFlow's operations are deterministic, also on a GPU. A seed must have been set."""
    import tensorflow as tf
    from tensorflow.python.framework import config

    before = config.is_op_determinism_enabled()
    tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        if not before:
            config.disable_op_determinism()
