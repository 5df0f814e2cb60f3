"""Batch normalization at inference is one fixed affine map (Section 3.1): here it joins the linear layer before it.

With scale = gamma / sqrt(moving_variance + epsilon), and W and b those of the layer before,

    BN(W u + b) = (scale * W) u + (scale * (b - moving_mean) + beta)

which saves a pass over every activation, and every normalization in a file for deployment.
"""

import keras
import numpy as np
from keras import ops

from bn_keras.batch_normalization import BatchNormalization
from bn_keras.convolution import Conv2D


def fold_batch_normalization(model: keras.Model) -> keras.Model:
    """A copy of a trained model, for inference, without batch normalization.

    Every `bn_keras` or Keras BatchNormalization is folded into the Dense, (depthwise, separable, transposed)
    convolution before it. Where there is none to fold into, because the layer before is another one, has a
    nonlinearity, is shared, or feeds other layers too, a `ScaleAndShift` takes its place. The outputs equal those of
    `model(x, training=False)` up to rounding.

    Args:
        model: a built functional or Sequential Keras model; nested ones are folded too.

    Returns:
        A functional model with the name and layer names of `model`, and with variables of its own.

    Raises:
        ValueError: the model is subclassed, or not built.
    """
    if isinstance(model, keras.Sequential) and model.built:
        functional = keras.Model(model.inputs, model.outputs, name=model.name)
    elif hasattr(model, "_nodes_by_depth") and not isinstance(model, keras.Sequential):
        functional = model
    else:
        raise ValueError(f"Only a built functional or Sequential model can be folded. Received: model={model!r}")
    linear_before = _linear_layers_before_normalizations(functional)
    normalization_after = {linear: normalization for normalization, linear in linear_before.items()}
    twins = {}

    def copy(layer):
        if layer in linear_before:
            twin = _Folded(name=layer.name)
        elif layer in normalization_after:
            twin = type(layer).from_config({**layer.get_config(), "use_bias": True})
        elif isinstance(layer, _NORMALIZATIONS):
            axis = None if getattr(layer, "per_activation", False) else layer.axis
            twin = ScaleAndShift(axis, name=layer.name, dtype=layer.dtype_policy)
        elif isinstance(layer, keras.Model):
            twin = fold_batch_normalization(layer)
        else:
            twin = type(layer).from_config(layer.get_config())
        return twins.setdefault(layer, twin)

    def call(twin, inputs, *args, **kwargs):
        if isinstance(twin, ScaleAndShift):
            return twin(inputs)
        return inputs if isinstance(twin, _Folded) else twin(inputs, *args, **kwargs)

    folded = keras.models.clone_model(functional, clone_function=copy, call_function=call)
    for layer, twin in twins.items():
        if layer in normalization_after:
            twin.set_weights(_folded_weights(layer, *_scale_and_shift(normalization_after[layer])))
        elif isinstance(layer, _NORMALIZATIONS) and layer not in linear_before:
            twin.set_weights(_scale_and_shift(layer))
        elif layer not in linear_before and not isinstance(layer, keras.Model):
            _copy_state(layer, twin)
    return folded


@keras.saving.register_keras_serializable(package="bn_keras")
class ScaleAndShift(keras.layers.Layer):
    """y = scale * x + shift for each channel: a batch normalization at inference.

    Args:
        axis: the channel dimension; None for a scale and a shift of every activation.
    """

    def __init__(self, axis=-1, **kwargs):
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def build(self, input_shape):
        rank = len(input_shape)
        own = range(1, rank) if self.axis is None else (self.axis % rank,)
        self._broadcast_shape = tuple(input_shape[i] if i in own else 1 for i in range(rank))
        shape = tuple(input_shape[i] for i in own)
        self.scale = self.add_weight(shape=shape, name="scale", initializer="ones", autocast=False)
        self.shift = self.add_weight(shape=shape, name="shift", initializer="zeros", autocast=False)

    def call(self, inputs):
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        scale, shift = (ops.reshape(ops.cast(v, dtype), self._broadcast_shape) for v in (self.scale, self.shift))
        return ops.cast(ops.cast(inputs, dtype) * scale + shift, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "axis": self.axis}


class _Folded(keras.layers.Identity):
    """In the place of a normalization that its linear layer has taken in; not called, so not in the model."""


_NORMALIZATIONS = (BatchNormalization, keras.layers.BatchNormalization)
_LAYERS = keras.layers
_KERNEL_ENDS_IN_OUTPUTS = (_LAYERS.Dense, _LAYERS.Conv1D, _LAYERS.Conv2D, Conv2D, _LAYERS.Conv3D)
_SEPARABLE = (_LAYERS.SeparableConv1D, _LAYERS.SeparableConv2D)
_TRANSPOSED = (_LAYERS.Conv1DTranspose, _LAYERS.Conv2DTranspose, _LAYERS.Conv3DTranspose)
_DEPTHWISE = (_LAYERS.DepthwiseConv1D, _LAYERS.DepthwiseConv2D)
_LINEAR = (*_KERNEL_ENDS_IN_OUTPUTS, *_SEPARABLE, *_TRANSPOSED, *_DEPTHWISE)


def _linear_layers_before_normalizations(functional):
    """{normalization: the linear layer that nothing else reads}, both called once."""
    nodes = [node for nodes in functional._nodes_by_depth.values() for node in nodes]
    calls, reads, producer = {}, {}, {}
    for node in nodes:
        calls[node.operation] = calls.get(node.operation, 0) + 1
        for tensor in node.input_tensors:
            reads[id(tensor)] = reads.get(id(tensor), 0) + 1
        for tensor in node.outputs:
            producer[id(tensor)] = node.operation
    for tensor in functional.outputs:
        reads[id(tensor)] = reads.get(id(tensor), 0) + 1
    found = {}
    for node in nodes:
        if not isinstance(node.operation, _NORMALIZATIONS):
            continue
        tensor = node.input_tensors[0]
        linear = producer[id(tensor)]
        once = reads[id(tensor)] == calls[linear] == calls[node.operation] == 1
        foldable = once and type(linear) in _LINEAR and linear.activation is keras.activations.linear
        by_channel = len(node.operation.moving_mean.shape) == 1
        if foldable and by_channel and _channel_axis(linear, tensor) == _axis(node.operation, tensor):
            found[node.operation] = linear
    return found


def _axis(normalization, tensor):
    return normalization.axis % len(tensor.shape)


def _channel_axis(linear, tensor):
    return 1 if getattr(linear, "data_format", None) == "channels_first" else len(tensor.shape) - 1


def _scale_and_shift(normalization):
    """scale and shift, float64 of the shape of moving_mean."""
    mean, variance, gamma, beta = (
        None if value is None else ops.convert_to_numpy(value).astype("float64")
        for value in (
            normalization.moving_mean,
            normalization.moving_variance,
            normalization.gamma,
            normalization.beta,
        )
    )
    scale = (1.0 if gamma is None else gamma) / np.sqrt(variance + normalization.epsilon)
    return [scale, (0.0 if beta is None else beta) - mean * scale]


def _folded_weights(linear, scale, shift):
    """The weights of the linear layer, with bias: kernel * scale, and bias * scale + shift."""
    *kernels, last = (value.astype("float64") for value in linear.get_weights())
    kernels, bias = (kernels, last) if linear.use_bias else ([*kernels, last], 0.0)
    if type(linear) in _TRANSPOSED:  # [..., outputs, inputs]
        kernel_scale = scale[:, None]
    elif type(linear) in _DEPTHWISE:  # [..., inputs, multiplier]; output i * multiplier + j
        kernel_scale = scale.reshape(kernels[-1].shape[-2:])
    else:  # [..., inputs, outputs], and of a separable convolution the pointwise kernel
        kernel_scale = scale
    return [*kernels[:-1], kernels[-1] * kernel_scale, bias * scale + shift]


def _copy_state(layer, twin):
    """Through the layer's own saving, which knows what follows from its variables (`Normalization` does)."""
    for source, target in zip(layer._flatten_layers(), twin._flatten_layers(), strict=True):
        store = {}
        source.save_own_variables(store)
        if store:
            target.load_own_variables({name: ops.convert_to_numpy(value) for name, value in store.items()})
