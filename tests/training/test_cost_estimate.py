"""What --dry_run says a run would cost, beside counts by hand and a pipeline whose seconds are known."""

import re

import keras
import pytest
from conftest import make_run_config, run_program

from bn_keras.training.cost_estimate import bytes_of_device

DESCRIBE = """
import sys, time, types
sys.path.insert(0, "tests")
import keras, numpy as np, tensorflow as tf
from bn_keras import BatchNormalization
from bn_keras.evaluation import trained_network
from bn_keras.training import cost_estimate
from bn_keras.training.distribution import make_strategy
from conftest import make_run_config

devices = int(sys.argv[1])

def build_network(*_, **__):
    layers = [keras.Input((4, 4, 1)), keras.layers.Flatten(), BatchNormalization(), keras.layers.Dense(3)]
    return keras.Sequential(layers)

def batches(examples, *, hosts, host):
    def slowly():
        while True:
            time.sleep(0.3)
            yield np.zeros((8, 4, 4, 1), "float32"), np.zeros(8, "int32")
    spec = tf.TensorSpec((8, 4, 4, 1)), tf.TensorSpec((8,), tf.int32)
    return tf.data.Dataset.from_generator(slowly, output_signature=spec).prefetch(2)

trained_network.build_network = build_network
config = make_run_config(batch_size=8, replicas=devices, deterministic=False)
strategy = make_strategy("mirrored" if devices > 1 else "one_device", devices)
print(cost_estimate.describe_cost(types.SimpleNamespace(config=config, training=batches), strategy))
"""


DESCRIBE_LARGE = """
import sys, types
sys.path.insert(0, "tests")
import keras, numpy as np, tensorflow as tf
from bn_keras.evaluation import trained_network
from bn_keras.training import cost_estimate
from bn_keras.training.distribution import make_strategy
from conftest import make_run_config

def build_network(*_, **__):
    layers = [keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(4096), keras.layers.Dense(4096)]
    return keras.Sequential([*layers, keras.layers.Dense(3)])

def batches(examples, *, hosts, host):
    return tf.data.Dataset.from_tensors((np.zeros((8, 4, 4, 1), "float32"), np.zeros(8, "int32"))).repeat()

def peak():
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

trained_network.build_network = build_network
for ema in (0.0, 0.5):
    config = make_run_config(batch_size=8, ema=ema)
    before = peak()
    fed = types.SimpleNamespace(config=config, training=batches)
    print(before, peak(), cost_estimate.describe_cost(fed, make_strategy("one_device")).replace("\\n", " "), peak())
"""


def test_the_memory_of_a_dry_run_is_that_of_weights_velocities_gradients_and_averages():
    """A network whose outputs are nothing beside its weights; the process's own memory beside the kernel's count."""
    done = run_program("-c", DESCRIBE_LARGE, warm=True)
    assert done.returncode == 0, done.stderr
    weights = 4 * (17 * 4096 + 4097 * 4096 + 4097 * 3)
    for line, copies in zip(done.stdout.splitlines(), (3, 4), strict=True):
        about, measured = re.search(r"memory of a device: about (\S+) GB, measured at most (\S+) GB", line).groups()
        assert float(about) == pytest.approx(copies * weights / 1e9, abs=0.006)  # printed with two digits
        assert int(line.split()[0]) / 1e9 - 0.006 < float(measured) < int(line.split()[-1]) / 1e9 + 0.006


def test_of_a_mini_batch_in_parts_a_device_holds_one_part_and_one_more_copy_of_the_gradients():
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3), keras.layers.Flatten()])
    outputs, weights = 2 * 6 * 6 * 4, 4 * (9 + 1)
    for parts, replicas, copies in ((1, 1, 3), (4, 1, 4), (2, 2, 4)):
        config = make_run_config(batch_size=256, accumulate=parts, replicas=replicas)
        share = 256 // parts // replicas
        assert bytes_of_device(model, config) == 4 * (copies * weights + share * outputs), (parts, replicas)


@pytest.mark.parametrize("devices", [1, 2])
def test_a_run_whose_batches_take_300_ms_is_said_to_take_300_ms_a_step(devices):
    done = run_program("-c", DESCRIBE, devices, warm=True)
    assert done.returncode == 0, done.stderr
    # BN of 16 values: gamma, beta and two averages; 16 x 3 weights and 3 biases.
    assert f"{4 * 16 + 16 * 3 + 3} parameters, {2 * 16 + 16 * 3 + 3} of them trainable" in done.stdout
    seconds, rate, waiting = re.search(
        r"a step takes (\S+) s, (\S+) images a second, (\d+)% of it waiting for input", done.stdout
    ).groups()
    assert float(seconds) == pytest.approx(0.3, rel=0.1)
    assert float(rate) == pytest.approx(8 / 0.3, rel=0.1)
    assert int(waiting) >= 75
    minutes, seconds = re.search(r"1,000 steps take about (\d+):(\d\d), ", done.stdout).groups()
    assert 60 * int(minutes) + int(seconds) == pytest.approx(1000 * 0.3, rel=0.1)
