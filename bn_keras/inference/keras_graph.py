"""The graph of calls behind a functional Keras model."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

import keras

from bn_keras.private_names import (
    Functional,
    SafeModeScope,
    calls_by_depth,
    functional_of,
    layers_within,
    operation_before,
    without_dropout_preparation,
)


def functional_graph(model: keras.Model) -> keras.Model | None:
    """The functional model that runs when a model is called; None if the model has its own `call` or is not built."""
    if isinstance(model, keras.Sequential):
        return functional_of(model) if runs_call_of(model, keras.Sequential) else None
    return model if isinstance(model, Functional) and runs_call_of(model, Functional) else None


def runs_call_of(layer: keras.Layer, kind: type[keras.Layer]) -> bool:
    """Whether the layer's `call` is that of the class `kind`, which no subclass has overridden."""
    return getattr(layer.call, "__func__", None) is kind.call


def graph_calls(functional: keras.Model) -> list[Any]:
    """The calls of a graph in an order in which they can be made.

    Each has its `operation` (a layer, or one of `keras.ops`), its `arguments`, and the symbolic tensors
    `input_tensors` and `outputs`.
    """
    by_depth = sorted(calls_by_depth(functional).items(), reverse=True)
    return [call for _, calls in by_depth for call in calls if not call.is_input]


def called_by_graphs(model: keras.Layer) -> set[Any]:
    """The operations that a model's graph calls, including those in nested models; none if it has no graph."""
    functional = functional_graph(model)
    operations = {call.operation for call in graph_calls(functional)} if functional else set()
    return operations.union(*map(called_by_graphs, filter(functional_graph, operations)))


def call_arguments(call: Any, values: Mapping[int, Any]) -> tuple[tuple, dict[str, Any]]:
    """The args and kwargs of a call, with every symbolic tensor replaced by `values[id(tensor)]`."""
    return call.arguments.fill_in(values)


def new_inputs(functional: keras.Model) -> Any:
    """New symbolic inputs with the structure, names, shapes and kinds of a functional model's inputs."""

    def renewed(tensor):
        layer = operation_before(tensor)
        return type(layer).from_config(layer.get_config()).output

    return keras.tree.map_structure(renewed, functional.input)


@contextlib.contextmanager
def unrolled(rnn: keras.layers.RNN) -> Iterator[None]:
    """For a `with` block, an RNN calls its cell once for each time step, in Python.

    Otherwise Keras calls the cell once more to learn the shape of the outputs, and calls each stacked cell but the last
    once more to prepare dropout, which inference does not use.
    """
    before = rnn.unroll
    rnn.unroll = True
    put_back = without_dropout_preparation(rnn)
    try:
        yield
    finally:
        rnn.unroll = before
        put_back()


def from_own_config(layer: keras.Layer, **changes: Any) -> keras.Layer:
    """A layer made from another layer's configuration, even if its classes and functions are not registered with Keras.

    Keras's own `from_config` fails if `__init__` does not take name, trainable and dtype, which each configuration has.
    """
    config = layer.get_config() | changes
    functions = {name: getattr(layer, name, None) for name in config}
    config.update((name, value) for name, value in functions.items() if isinstance(value, FunctionType))
    if "dtype" in config:
        config["dtype"] = layer.dtype_policy  # a DTypePolicyMap forgets its policies when it is saved
    parameters = inspect.signature(type(layer).__init__).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    classes = {type(part).__name__: type(part) for part in layers_within(layer)}
    with keras.saving.custom_object_scope(classes), SafeModeScope(safe_mode=False):
        twin = type(layer).from_config({name: config[name] for name in config if takes_all or name in parameters})
    if not takes_all:
        twin.name, twin.trainable, twin.dtype_policy = layer.name, layer.trainable, layer.dtype_policy
    return twin
