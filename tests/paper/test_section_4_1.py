"""Section 4.1: the two networks, their exact resume, and Figure 1 by the real program."""

import json
import signal
import time

import numpy as np
import pytest
from conftest import run_program, start_program

from bn_keras.paper.figure_1 import NETWORKS, STABILITY, Network, claims, figure_1_table
from bn_keras.paper.mnist_config import MnistConfig
from bn_keras.paper.section_4_1 import batch_indices, build_network
from bn_keras.runs import checkpoint
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.training_curve import TrainingCurve


def command(data_dir, workdir, *flags):
    return ["-m", "launch.mnist", f"--data_dir={data_dir}", f"--workdir={workdir}", "--eval_every=400", *flags]


def reproducible(workdir):
    rows = TrainingCurve(str(workdir / "curve.jsonl")).rows
    return [{name: value for name, value in row.items() if name != "wall_time"} for row in rows]


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mnist")
    done = run_program(*command(data_dir, workdir, "--steps=1200"), warm=True)
    assert done.returncode == 0, done.stderr
    assert "| With BN |" in done.stdout
    return workdir


def test_both_networks_are_three_layers_of_100_sigmoids_and_bn_replaces_the_bias():
    plain, normalized = (build_network(bn, classes=10, weight_deviation=0.1, seed=0) for bn in (False, True))
    weights = 784 * 100 + 2 * 100 * 100 + 100 * 10 + 10
    assert plain.count_params() == weights + 3 * 100
    assert sum(int(np.prod(v.shape)) for v in normalized.trainable_variables) == weights + 3 * 2 * 100


def test_both_networks_start_from_the_same_small_gaussian_weights():
    plain, normalized = (
        [w.numpy() for w in build_network(bn, classes=10, weight_deviation=0.1, seed=3).weights if "kernel" in w.path]
        for bn in (False, True)
    )
    for one, other in zip(plain, normalized, strict=True):
        np.testing.assert_array_equal(one, other)
    assert abs(plain[0].std() - 0.1) < 0.001 and abs(plain[0].mean()) < 0.001  # 78,400 draws: 0.0004
    assert not np.array_equal(plain[1], plain[2])


def test_the_second_output_is_what_the_last_sigmoids_receive():
    model = build_network(True, classes=10, weight_deviation=0.1, seed=0)
    logits, before_sigmoid = (output.numpy() for output in model(np.eye(5, 784, dtype="float32"), training=False))
    kernel, bias = (weight.numpy() for weight in model.weights[-2:])
    np.testing.assert_allclose(logits, 1 / (1 + np.exp(-before_sigmoid)) @ kernel + bias, rtol=1e-5)


def test_an_epoch_is_every_example_once_and_batches_are_the_same_from_any_step():
    batches = batch_indices(examples=9, batch_size=6, seed=1, start=0, count=6)
    epochs = batches.reshape(-1, 9)
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    np.testing.assert_array_equal(batch_indices(9, 6, seed=1, start=2, count=3), batches[2:5])


def test_the_curve_has_both_networks_and_batch_normalization_learns_sooner(finished):
    rows = reproducible(finished)
    assert [row["step"] for row in rows] == [s for step in (400, 800, 1200) for s in (step, step)]
    assert all(np.shape(row["percentiles"]) == (3, 100) and row["of"] == 21 for row in rows)
    loss = {row["network"]: row["loss"] for row in rows if row["step"] == 400}
    assert loss["with_bn"] < 0.5 * loss["without_bn"]


def test_a_killed_run_goes_on_bit_for_bit(data_dir, finished, tmp_path):
    process = start_program(*command(data_dir, tmp_path, "--steps=1200"), warm=True)
    while not list(tmp_path.glob("checkpoint-*1000.npz")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert run_program(*command(data_dir, tmp_path, "--steps=1200"), warm=True).returncode == 0
    assert reproducible(tmp_path) == reproducible(finished)
    arrays, other = (checkpoint.load_newest(str(path))[1] for path in (tmp_path, finished))
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.slow
def test_another_run_in_the_same_folder_is_refused_by_name(data_dir, finished):
    done = run_program(*command(data_dir, finished, "--steps=1200", "--learning_rate=0.2"))
    assert done.returncode == 1 and "learning_rate 0.1 (now 0.2)" in done.stderr and "Traceback" not in done.stderr
    assert "--allow_change" not in done.stderr  # which this program has not


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_with_one_line(data_dir, tmp_path):
    done = run_program(*command(data_dir, tmp_path, "--steps=1200", "--learning_rate=1e38"))
    assert done.returncode == 1 and "is not finite before step 400" in done.stderr and "Traceback" not in done.stderr


def test_the_typical_sigmoid_is_the_one_that_drifts_as_far_as_the_median_one():
    medians = [[0, 0, 0], [5, 1, 3], [2, 0, 0]]  # of three sigmoids at three evaluations: drifts 5, 1 and 3
    assert network(([0] * 3, row, [0] * 3) for row in medians).typical_unit() == 2


def network(percentiles):
    return Network([{"step": k, "top1": 1, "of": 1, "percentiles": list(row)} for k, row in enumerate(percentiles)])


def test_stability_is_read_in_four_ways_each_lower_where_the_distribution_stays():
    # One sigmoid at two evaluations: its median goes from 1 to 3, its edges from 0 and 2 to 1 and 7.
    moving = network([([0], [1], [2]), ([1], [3], [7])])
    assert [moving.median_over_units(measure) for measure in STABILITY.values()] == [2, 2 / 4, 5, 3]
    still = network([([0], [1], [2]), ([0], [1], [2])])
    assert [still.median_over_units(measure) for measure in STABILITY.values()] == [0, 0, 0, 1]


def test_of_several_seeds_the_table_has_the_mean_and_the_range(tmp_path):
    runs = []
    for seed, right in enumerate((80, 90)):
        config = {"dataset": "digits", "train_examples": 60, "test_examples": 100, "steps": 2, "batch_size": 60}
        config |= {"learning_rate": 0.1, "weight_deviation": 0.1, "seed": seed, "eval_every": 1}
        config |= {"dataset_fingerprint": "f" * 64}
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "mnist.json").write_text(json.dumps(config))
        looks = [[0.0] * 100, [1.0] * 100, [2.0] * 100]
        rows = [
            {"kind": "test", "network": name, "step": step, "examples": 60, "of": 100, "percentiles": looks}
            | {"top1": right + (step if name == "with_bn" else 0)}
            for step in (1, 2)
            for name in NETWORKS
        ]
        (tmp_path / str(seed) / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(RunDirectory(str(tmp_path / str(seed)), MnistConfig))
    assert "| With BN | 1 (1 to 1) | 87.0% (82.0% to 92.0%) | 2 (2 to 2) | 87.0%" in figure_1_table(runs)
    assert claims(runs)[1] == (
        "Test accuracy is higher with BN",
        "yes",
        "+2.0 points (+2.0 points to +2.0 points)",
        True,
    )
