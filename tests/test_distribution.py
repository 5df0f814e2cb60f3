"""Every strategy is made from what the environment says, or refused with a line that says what is missing."""

import json

import pytest
import tensorflow as tf
from conftest import run_program

from bn_keras import distribution
from bn_keras.distribution import make_strategy
from bn_keras.errors import InputError


def test_without_a_tpu_there_is_one_clear_line():
    code = "from bn_keras.distribution import make_strategy; make_strategy('tpu', tpu='local')"
    done = run_program("-c", code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "no TPU at --tpu=local" in last and "run on a TPU VM with tensorflow-tpu" in last


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one_device", {"tpu": "local"}, "--tpu=local needs --strategy=tpu"),
        ("tpu", {"devices": 2}, "--devices cannot work with --strategy=tpu"),
        ("one_device", {"devices": 2}, "--devices=2 cannot work with --strategy=one_device"),
        ("multi_worker", {}, "finds neither TF_CONFIG nor SLURM's variables"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch, name, options, message):
    for variable in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match=message):
        make_strategy(name, **options)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "TF_CONFIG is no JSON"),
        ("{}", "TF_CONFIG names no task"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}', "TF_CONFIG names no task"),
    ],
)
def test_a_wrong_tf_config_is_refused_with_an_example(monkeypatch, value, message):
    monkeypatch.setenv("TF_CONFIG", value)
    with pytest.raises(InputError, match=message) as error:
        make_strategy("multi_worker")
    assert '"task": {"type": "worker", "index": 0}' in str(error.value)


def slurm(monkeypatch, task):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    for name, value in {
        "SLURM_PROCID": str(task),
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_NODELIST": "node[7-8]",
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_RESV_PORTS": "12000-12003",
    }.items():
        monkeypatch.setenv(name, value)


def test_slurm_names_the_workers(monkeypatch):
    slurm(monkeypatch, task=3)
    assert distribution._cluster_size() == 4
    cluster = distribution._cluster()
    assert cluster.cluster_spec().as_dict() == {"worker": ["node7:12000", "node7:12001", "node8:12000", "node8:12001"]}
    assert (cluster.task_type, cluster.task_id) == ("worker", 3)


def test_tf_config_counts_its_workers(monkeypatch):
    monkeypatch.setenv(
        "TF_CONFIG", json.dumps({"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"], "ps": ["d:1"]}})
    )
    assert distribution._cluster_size() == 3


def test_a_process_alone_is_the_chief():
    assert distribution.is_chief(tf.distribute.OneDeviceStrategy("CPU:0"))


@pytest.mark.parametrize(
    ("jobs", "task", "chief"),
    [
        ({"worker": ["a:1", "b:1"]}, ("worker", 0), True),
        ({"worker": ["a:1", "b:1"]}, ("worker", 1), False),
        ({"chief": ["a:1"], "worker": ["b:1"]}, ("worker", 0), False),
        ({"chief": ["a:1"], "worker": ["b:1"]}, ("chief", 0), True),
    ],
)
def test_one_worker_is_the_chief(jobs, task, chief):
    class Strategy:
        cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(jobs), task_type=task[0], task_id=task[1]
        )

    assert distribution.is_chief(Strategy) is chief


def test_one_host_reads_whole_batches():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    made = []

    def make_batches(hosts, host):
        made.append((hosts, host))
        return tf.data.Dataset.range(6).batch(3, drop_remainder=True)

    batches = list(distribution.distribute(strategy, make_batches))
    assert made == [(1, 0)]
    assert [batch.numpy().tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5]]
