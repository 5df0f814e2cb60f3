"""Every strategy is made from what the environment says, or refused with a line that says what is missing."""

import json
import os

import pytest
import tensorflow as tf
from conftest import run_program

from bn_keras.errors import InputError
from bn_keras.training import distribution
from bn_keras.training.distribution import make_strategy


def test_without_a_tpu_there_is_one_clear_line():
    code = "from bn_keras.training.distribution import make_strategy; make_strategy('tpu', tpu='local')"
    done = run_program("-c", code, warm=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "no TPU at `tpu=local`" in last and "run on a TPU VM with tensorflow-tpu" in last


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("one_device", {"tpu": "local"}, "`tpu=local` needs `strategy=tpu`"),
        ("tpu", {"devices": 2}, "`devices` cannot work with `strategy=tpu`"),
        ("one_device", {"devices": 2}, "`devices=2` cannot work with `strategy=one_device`"),
        ("multi_worker", {}, "finds neither TF_CONFIG nor SLURM's variables"),
    ],
)
def test_what_cannot_work_is_refused(monkeypatch, name, options, message):
    for variable in ("TF_CONFIG", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(InputError, match=message):
        make_strategy(name, **options)


FIRST = {"type": "worker", "index": 0}
TWO = {"worker": ["a:1", "b:2"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "TF_CONFIG is not JSON"),
        ("[]", "is [], not type 'object'"),
        ("null", "is None, not type 'object'"),
        ({}, "names no task"),
        ({"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}, "names no task"),
        ({"cluster": TWO}, "names no task"),
        ({"cluster": TWO, "task": None}, "$.task is None"),
        ({"cluster": TWO, "task": {"type": "worker", "index": -1}}, "names no task"),
        ({"cluster": TWO, "task": {"type": "worker", "index": "second"}}, "$.task.index is 'second', not a number"),
        ({"cluster": TWO, "task": {"type": "evaluator", "index": 0}}, "'evaluator', not chief or worker"),
        ({"cluster": TWO | {"ps": ["c:1"]}, "task": FIRST}, "the jobs chief and worker, which train"),
        ({"cluster": {"worker": "a:1"}, "task": FIRST}, "$.cluster.worker is 'a:1', not type 'array'"),
        ({"cluster": {"worker": ["a", "b"]}, "task": FIRST}, "$.cluster.worker[0] is 'a', not HOST:PORT"),
        ({"cluster": {"worker": ["a:1", "b:99999"]}, "task": FIRST}, "$.cluster.worker[1] is 'b:99999'"),
        ({"cluster": {"worker": ["a:1", "a:1"]}, "task": FIRST}, "names a:1 twice"),
        ({"cluster": {"chief": ["a:1", "b:1"]}, "task": {"type": "chief", "index": 0}}, "names 2 chiefs"),
    ],
)
def test_a_wrong_tf_config_is_refused_with_an_example(monkeypatch, value, message):
    monkeypatch.setenv("TF_CONFIG", value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(InputError) as error:
        distribution.find_cluster(alone=True)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert '"task": {"type": "worker", "index": 0}' in str(error.value)


@pytest.mark.parametrize("value", ["", "{}", {"cluster": {"worker": ["a:1"]}, "task": FIRST}, {"task": FIRST}])
def test_one_process_or_none_is_no_cluster(monkeypatch, value):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.setenv("TF_CONFIG", value if isinstance(value, str) else json.dumps(value))
    assert distribution.find_cluster() is None


def test_tf_config_names_the_workers_and_this_one(monkeypatch):
    jobs = {"chief": ["a:1"], "worker": ["[::1]:2", "b:3"]}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": jobs, "task": {"type": "worker", "index": "1"}}))
    cluster = distribution.find_cluster()
    assert cluster.cluster_spec().as_dict() == jobs
    assert (cluster.task_type, cluster.task_id) == ("worker", 1)
    assert distribution.addresses(cluster) == ["a:1", "[::1]:2", "b:3"]
    assert distribution.addresses(cluster, others=True) == ["a:1", "[::1]:2"]


def slurm(monkeypatch, task, **changes):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    variables = {
        "PROCID": str(task),
        "STEP_NUM_TASKS": "4",
        "STEP_NODELIST": "node[7-8]",
        "STEP_TASKS_PER_NODE": "2(x2)",
        "STEP_RESV_PORTS": "12000-12003",
    }
    for name, value in (variables | changes).items():
        if value is None:
            monkeypatch.delenv(f"SLURM_{name}", raising=False)
        else:
            monkeypatch.setenv(f"SLURM_{name}", value)


def test_slurm_names_the_workers(monkeypatch):
    slurm(monkeypatch, task=3)
    cluster = distribution.find_cluster()
    assert cluster.cluster_spec().as_dict() == {"worker": ["node7:12000", "node7:12001", "node8:12000", "node8:12001"]}
    assert (cluster.task_type, cluster.task_id) == ("worker", 3)


@pytest.mark.parametrize(
    "changes",
    [
        *({"STEP_NUM_TASKS": value} for value in ("x", "0", "-2", "3")),
        *({"STEP_NODELIST": value} for value in (None, "", "n[1", "node7")),
        *({"STEP_TASKS_PER_NODE": value} for value in (None, "many")),
        *({"PROCID": value} for value in (None, "7", "-1")),
        *({"STEP_RESV_PORTS": value} for value in ("", "x", "99999")),
    ],
    ids=str,
)
def test_slurms_variables_that_do_not_fit_together_are_named(monkeypatch, changes):
    slurm(monkeypatch, 1, **changes)
    ((name, value),) = changes.items()
    with pytest.raises(InputError, match=r"\ASLURM.s variables name no cluster") as error:
        distribution.find_cluster()
    assert f"SLURM_{name}={value}" in str(error.value) and "\n" not in str(error.value)


def test_more_tasks_on_a_node_than_gpus_are_refused(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: of this test'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    slurm(monkeypatch, 0)
    with pytest.raises(InputError, match="more tasks on a node than GPUs"):
        distribution.find_cluster()


def test_slurm_with_one_task_or_an_empty_variable_is_no_cluster(monkeypatch):
    for tasks in ("1", ""):
        slurm(monkeypatch, 0, STEP_NUM_TASKS=tasks)
        assert distribution.find_cluster() is None


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
