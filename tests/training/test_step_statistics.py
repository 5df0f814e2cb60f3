"""What training says of its own speed, beside clocks and counts of the test's own, on one device and on two."""

import json

import pytest
from conftest import run_program

# The trainer's loop on a small network. Without its batch it prepares for 0.1 s, as where weights are read and cast;
# its optimizer takes 0.1 s, after the loss is there and before the weights are.
MEASURE = """
import json, sys, time
sys.path.insert(0, "tests")
import keras, numpy as np, tensorflow as tf
from bn_keras import BatchNormalization
from bn_keras.training import process_settings, training_state
from bn_keras.training.distribution import distribute, make_strategy
from bn_keras.training.optimizer import MomentumSGD
from bn_keras.training.step_statistics import StepStatistics
from conftest import make_run_config

SECONDS, BATCH = 0.1, 8
devices, deterministic = map(int, sys.argv[1:])

def slept():
    return tf.ensure_shape(tf.numpy_function(lambda: time.sleep(SECONDS) or np.float32(0), [], tf.float32), [])

class PreparesSlowly(keras.layers.Layer):
    def call(self, x):
        return x + slept()

def small_network(config):
    layers = [PreparesSlowly(), keras.layers.Flatten(), BatchNormalization(), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4, 4, 1)), *layers])

apply = MomentumSGD.apply

def apply_slowly(self, gradients, *others):
    with tf.control_dependencies(gradients):
        late = slept()
    with tf.control_dependencies([late]):
        apply(self, gradients, *others)

MomentumSGD.apply = apply_slowly
process_settings.uses_gpus = lambda strategy: bool(deterministic)  # which have another clock
strategy = make_strategy("mirrored" if devices > 1 else "one_device", devices)
config = make_run_config(image_size=4, batch_size=BATCH, replicas=devices, deterministic=bool(deterministic))
state = training_state.TrainingState(config, strategy, small_network)
train_steps = training_state.make_train_steps(state, config, strategy)
batch = np.random.default_rng(0).normal(size=(BATCH, 4, 4, 1)).astype("float32"), np.arange(BATCH, dtype="int32") % 3

def measured(batches, count):
    iterator = iter(distribute(strategy, lambda hosts, host: batches))
    train_steps(iterator, tf.constant(4))  # compiles, and takes what was ready
    started = time.perf_counter()
    # As a row of the curve has several calls.
    times = [train_steps(iterator, tf.constant(part)).numpy() for part in (1, count - 1)]
    return (time.perf_counter() - started) / count, row(*times), [row(step[None]) for step in np.concatenate(times)]

def row(*times):
    statistics = StepStatistics(devices)
    for part in times:
        statistics.add(part, BATCH)
    return statistics.take()

def slowly(seconds):
    while True:
        time.sleep(seconds)
        yield batch

constant = tf.data.Dataset.from_tensors(batch).repeat()
compute, fed, steps = measured(constant, 10)
slow = tf.data.Dataset.from_generator(lambda: slowly(3 * compute), output_signature=constant.element_spec)
total, starved, _ = measured(slow, 8)
waits = [step["input_wait"] for step in steps]
print(json.dumps({"compute": compute, "fed": fed, "waits": waits, "total": total, "starved": starved, "batch": BATCH}))
"""


@pytest.fixture(scope="module", params=[(1, 0), (2, 0), (2, 1)], ids=["one device", "two", "two, the clock of GPUs"])
def measured(request):
    done = run_program("-c", MEASURE, *request.param, warm=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"devices": request.param[0]}


def test_nothing_waits_for_a_batch_that_is_always_there(measured):
    """On a busy machine a step may wait for a processor before it takes the batch, so the calmest one counts."""
    assert 0 <= min(measured["waits"]) < 0.02


def test_a_pipeline_three_times_too_slow_is_waited_for_all_but_the_steps_own_time(measured):
    assert measured["starved"]["input_wait"] == pytest.approx(1 - measured["compute"] / measured["total"], abs=0.05)


@pytest.mark.parametrize("pipeline, seconds", [("fed", "compute"), ("starved", "total")])
def test_images_a_second_are_those_of_a_clock_outside(measured, pipeline, seconds):
    rate = measured["batch"] / measured[seconds]
    found = measured[pipeline]
    assert found["images_per_second"] == pytest.approx(rate, rel=0.05)
    assert found["images_per_second_per_device"] == pytest.approx(rate / measured["devices"], rel=0.05)


def test_the_median_step_takes_what_a_clock_outside_says(measured):
    assert measured["fed"]["step_seconds_p50"] == pytest.approx(measured["compute"], rel=0.1)
    assert measured["starved"]["step_seconds_p50"] == pytest.approx(measured["total"], rel=0.1)
