"""What XLA makes of a layer, read off its optimized program (HLO): the memory that its kernels read and write."""

import math
import re


def optimized_hlo(layer, x, dy=None):
    """XLA's program for a layer in training, as text: of the forward pass, or with dy of forward and backward."""
    import keras

    layer.build(x.shape)
    parameters = [variable.value for variable in layer.trainable_variables]
    if keras.backend.backend() == "jax":
        import jax

        averages = [variable.value for variable in layer.non_trainable_variables]

        def forward(x, parameters):
            return layer.stateless_call(parameters, averages, x, training=True)

        def both(x, parameters, dy):
            y, backward, moved = jax.vjp(forward, x, parameters, has_aux=True)
            return y, backward(dy), moved

        lowered = jax.jit(forward).lower(x, parameters) if dy is None else jax.jit(both).lower(x, parameters, dy)
        return lowered.compile().as_text()
    import tensorflow as tf

    @tf.function(jit_compile=True)
    def step(x, *dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        return y, tape.gradient(y, [x, *parameters], *dy) if dy else ()

    arguments = (x,) if dy is None else (x, dy)
    return step.experimental_get_compiler_ir(*arguments)(stage="optimized_hlo")


_WIDTHS = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "f16": 2, "bf16": 2, "pred": 1}
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
_SAME_VALUES = {"bitcast", "convert", "copy", "reshape", "transpose"}
_PARTS = {"slice", "gather", "dynamic-slice"}


def memory_traffic(hlo):
    """(bytes that the kernels of an optimized HLO module read and write, how many kernels it has)."""
    computations = {}
    for line in hlo.splitlines():
        if opened := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            instructions = computations["ENTRY" if opened[1] else opened[2]] = {}
        elif found := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)", line):
            name, shape, kind, operands, rest = found.groups()
            called = re.search(r"calls=%?([\w.-]+)", rest)
            reads = [operands] if kind == "parameter" else re.findall(r"%([\w.-]+)", operands)
            instructions[name] = kind, shape, reads, called and called[1]
    traffic = kernels = 0
    entry = computations["ENTRY"]
    for kind, shape, reads, called in entry.values():
        if kind not in _NO_KERNEL:
            kernels += 1
            traffic += _bytes(shape)
            for number, name in enumerate(reads):
                share = _share_read(computations[called], str(number)) if called else 1.0
                traffic += share * _bytes(entry[name][1])
    return traffic, kernels


def _bytes(shape):
    return sum(_WIDTHS[kind] * math.prod(sizes) for kind, sizes in _arrays(shape))


def _elements(shape):
    return sum(math.prod(sizes) for _, sizes in _arrays(shape))


def _arrays(shape):
    """[(type, sizes)] of a shape as HLO writes it, or of a tuple of them."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return [(kind, [int(size) for size in sizes.split(",") if size]) for kind, sizes in found]


def _share_read(computation, number):
    """The share of an operand that a fusion reads: all of it, or the slices of it."""

    def share(name):
        total = 0.0
        for user, (kind, shape, reads, _) in computation.items():
            if name in reads:
                if kind not in _PARTS | _SAME_VALUES:
                    return 1.0
                part = _elements(shape) / max(1, _elements(computation[name][1]))
                total += share(user) if kind in _SAME_VALUES else part
        return min(1.0, total)

    (parameter,) = (name for name, value in computation.items() if value[0] == "parameter" and value[2] == [number])
    return share(parameter)
