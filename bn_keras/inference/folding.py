"""Folds batch normalization, at inference one fixed affine map (Section 3.1), into the linear layer before it.

With scale = gamma / sqrt(moving_variance + epsilon), and W and b the kernel and bias of that layer,

    BN(W u + b) = (scale * W) u + scale * (b - moving_mean) + beta

which saves a pass over every activation, and leaves no normalization in a file for deployment.
"""

import contextlib
import tempfile
from collections import Counter

import keras
import numpy as np
from keras import ops

from bn_keras.inference.keras_graph import call_arguments, from_own_config, functional_graph, graph_calls, new_inputs
from bn_keras.layers.batch_normalization import BatchNormalization
from bn_keras.layers.scale_and_shift import ScaleAndShift
from bn_keras.private_names import layers_within, mask_of, outside_graphs


def fold_batch_normalization(model: keras.Model) -> keras.Model:
    """A copy of a trained model, for inference, without batch normalization.

    Every `bn_keras` or Keras BatchNormalization is folded into the Dense, (depthwise, separable, transposed)
    convolution before it. A layer of another kind, with a nonlinearity, quantized, shared, or read by other layers too
    cannot take it in: a `ScaleAndShift` then stands where the batch normalization was. The outputs equal
    those of `model(x, training=False)` up to rounding.

    A batch normalization stays if the model calls it with `training=True`, if it is of a subclass, or if it is inside
    of a layer that is not itself a functional or Sequential model: TimeDistributed, an RNN, a custom layer or a
    subclassed model.

    Args:
        model: a built functional or Sequential Keras model; nested ones are folded too.

    Returns:
        A functional model with the name and layer names of `model` and variables of its own. It is not compiled.

    Raises:
        ValueError: the model is subclassed, or not built, or a layer cannot be made from its own `get_config`.
    """
    functional = functional_graph(model)
    if functional is None:
        raise ValueError(
            "Only a built functional or Sequential model can be folded, and none with a `call` of its own. "
            f"Received: model={model!r}"
        )
    calls = graph_calls(functional)
    linear_before = _linear_layers_before_normalizations(functional, calls)
    normalization_after = {linear: normalization for normalization, linear in linear_before.items()}
    in_training = {call.operation for call in calls if _is_in_training(call)}
    twins, load_states = {}, []

    def make_twin(operation):
        if operation in normalization_after:
            twin = _copy(operation, use_bias=True)
            affine_map = _center_scale_and_shift(normalization_after[operation])
            load_states.append(lambda: twin.set_weights(_folded_weights(operation, *affine_map)))
        elif type(operation) in _NORMALIZATIONS and operation not in in_training:
            axis = None if getattr(operation, "per_activation", False) else operation.axis
            twin = ScaleAndShift(axis, name=operation.name, dtype=operation.dtype_policy)
            load_states.append(lambda: twin.set_weights(_center_scale_and_shift(operation)))
        elif functional_graph(operation):
            twin = fold_batch_normalization(operation)
        elif getattr(operation, "variables", None):
            twin = _copy(operation)
            load_states.append(lambda: _copy_variables(operation, twin))
        else:
            twin = outside_graphs(operation)
        return twin

    inputs = new_inputs(functional)
    values = dict(zip(map(id, functional.inputs), keras.tree.flatten(inputs), strict=True))
    for call in calls:
        args, kwargs = call_arguments(call, values)
        if call.operation in linear_before:
            outputs = _what_is_normalized(args, kwargs)
        else:
            if call.operation not in twins:
                twins[call.operation] = make_twin(call.operation)
            with _errors_naming(call.operation):
                outputs = twins[call.operation](*args, **kwargs)
        values.update(zip(map(id, call.outputs), keras.tree.flatten(outputs), strict=True))
    outputs = keras.tree.map_structure(lambda tensor: values[id(tensor)], functional.output)
    folded = keras.Model(inputs, outputs, name=model.name)
    for load_state in load_states:
        load_state()
    return folded


_NORMALIZATIONS = (BatchNormalization, keras.layers.BatchNormalization)
_LAYERS = keras.layers
_KERNEL_ENDS_IN_OUTPUTS = (_LAYERS.Dense, _LAYERS.Conv1D, _LAYERS.Conv2D, _LAYERS.Conv3D)
_SEPARABLE = (_LAYERS.SeparableConv1D, _LAYERS.SeparableConv2D)
_TRANSPOSED = (_LAYERS.Conv1DTranspose, _LAYERS.Conv2DTranspose, _LAYERS.Conv3DTranspose)
_DEPTHWISE = (_LAYERS.DepthwiseConv1D, _LAYERS.DepthwiseConv2D)
_LINEAR = (*_KERNEL_ENDS_IN_OUTPUTS, *_SEPARABLE, *_TRANSPOSED, *_DEPTHWISE)


def _linear_layers_before_normalizations(functional, calls):
    """{normalization: the linear layer before it}, where both are called once and nothing else reads that layer."""
    times = Counter(call.operation for call in calls)
    reads = Counter(id(tensor) for call in calls for tensor in call.input_tensors)
    reads.update(id(tensor) for tensor in functional.outputs)
    producer = {id(tensor): call.operation for call in calls for tensor in call.outputs}
    found = {}
    for call in calls:
        normalization = call.operation
        if type(normalization) not in _NORMALIZATIONS or _is_in_training(call):
            continue
        tensor = _what_is_normalized(call.arguments.args, call.arguments.kwargs)
        linear = producer.get(id(tensor))
        once = reads[id(tensor)] == times[linear] == times[normalization] == 1
        own_mask = call.arguments.kwargs.get("mask") in (None, mask_of(tensor))
        if once and own_mask and _is_plain(linear) and _takes_in(linear, normalization, tensor):
            found[normalization] = linear
    return found


def _is_in_training(call):
    training = call.arguments.kwargs.get("training")
    return not (training is None or training is False)


def _what_is_normalized(args, kwargs):
    return args[0] if args else kwargs["inputs"]


def _is_plain(linear):
    """Whether a layer computes W u + b of the weights that it holds, and no more."""
    return (
        type(linear) in _LINEAR
        and linear.activation is keras.activations.linear
        and linear.activity_regularizer is None
        and linear.quantization_mode is None
        and not getattr(linear, "lora_enabled", False)
    )


def _takes_in(linear, normalization, tensor):
    """Whether the normalization has one scale and shift for each output of the linear layer, and the same dtype."""
    return (
        len(normalization.moving_mean.shape) == 1
        and _channel_axis(linear, tensor) == _axis(normalization, tensor)
        and linear.compute_dtype == normalization.compute_dtype
    )


def _axis(normalization, tensor):
    return normalization.axis % len(tensor.shape)


def _channel_axis(linear, tensor):
    return 1 if getattr(linear, "data_format", None) == "channels_first" else len(tensor.shape) - 1


def _center_scale_and_shift(normalization):
    """moving_mean, gamma / sqrt(moving_variance + epsilon) and beta, float64 of the shape of moving_mean."""
    center, variance = (_float64(average) for average in (normalization.moving_mean, normalization.moving_variance))
    gamma = 1.0 if normalization.gamma is None else _float64(normalization.gamma)
    beta = np.zeros_like(center) if normalization.beta is None else _float64(normalization.beta)
    return [center, gamma / np.sqrt(variance + normalization.epsilon), beta]


def _float64(variable):
    return ops.convert_to_numpy(variable).astype("float64")


def _folded_weights(linear, center, scale, shift):
    """The folded weights of the linear layer: the kernel * scale, and the bias (bias - center) * scale + shift."""
    *kernels, last = (value.astype("float64") for value in linear.get_weights())
    kernels, bias = (kernels, last) if linear.use_bias else ([*kernels, last], 0.0)
    if type(linear) in _TRANSPOSED:  # [..., outputs, inputs]
        kernel_scale = scale[:, None]
    elif type(linear) in _DEPTHWISE:  # [..., inputs, multiplier]; output i * multiplier + j
        kernel_scale = scale.reshape(kernels[-1].shape[-2:])
    else:  # [..., inputs, outputs], and of a separable convolution the pointwise kernel
        kernel_scale = scale
    return [*kernels[:-1], kernels[-1] * kernel_scale, (bias - center) * scale + shift]


def _copy(layer, **changes):
    """A layer of the same configuration, with the assets that are no variables, such as a vocabulary."""
    with _errors_naming(layer):
        twin = from_own_config(layer, **changes)
        sources, targets = (
            [part for part in layers_within(each) if hasattr(part, "save_assets")] for each in (layer, twin)
        )
        for source, target in zip(sources, targets, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                source.save_assets(folder)
                target.load_assets(folder)
    return twin


def _copy_variables(layer, twin):
    """Copies by the layer's own saving and loading: some layers derive state from variables (`Normalization`)."""
    with _errors_naming(layer):
        for source, target in zip(layers_within(layer), layers_within(twin), strict=True):
            if source.built and not target.built:  # its layer builds it when it is first called with values
                target.build_from_config(source.get_build_config())
            store = {}
            source.save_own_variables(store)
            if store:
                target.load_own_variables({name: ops.convert_to_numpy(value) for name, value in store.items()})
            if getattr(source, "lora_enabled", False):  # Keras saves kernel + a b, which rounds where it is quantized
                for old, new in zip(source.variables, target.variables, strict=True):
                    new.assign(old)


@contextlib.contextmanager
def _errors_naming(layer):
    """Turns whatever a layer's own code raises into one line that names the layer."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__context__ is not None:  # Keras wraps the cause in a text that quotes whole configurations
            cause = cause.__context__
        reason = " ".join(str(cause).strip().partition("\n\n")[0].split())
        raise ValueError(
            f"Layer '{layer.name}' ({type(layer).__name__}) cannot be made again from its get_config: {reason}"
        ) from error
