"""Runs and records in buckets: fsspec's memory in this process, and moto's S3 server, a real store's interface.

A run there is the same, bit for bit, as one in a local folder, also after kills.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from conftest import ROOT, run_program, start_program
from warm_start import shrink

from bn_keras import InputError, read_dataset, storage
from bn_keras.input.shard_cache import on_this_machine
from bn_keras.runs.run_directory import RunDirectory, find_runs
from bn_keras.runs.run_files import replacing, states, write_text
from bn_keras.runs.training_curve import MEASURED
from bn_keras.training import make_config, train

fsspec = pytest.importorskip("fsspec")
pytestmark = pytest.mark.needs("fsspec")
SETTINGS = {"image_size": 32, "width": 0.1, "batch_size": 16, "eval_batch_size": 21, "eval_every": 3, "log_every": 2}


@pytest.fixture
def memory():
    """The URL of an empty bucket in this process's memory, which no other process sees."""
    store = fsspec.filesystem("memory")
    store.pipe_file("/b/other", b"")
    yield "memory://b"
    store.rm("/b", recursive=True)


def config_of(dataset, **changes):
    return make_config(dataset, "bn_x5", **SETTINGS | {"steps": 8, "checkpoint_every": 2} | changes)


def rows_of(directory):
    rows = RunDirectory(str(directory)).curve.rows
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def assert_equal_runs(one, two):
    """The last checkpoints to the bit, but for the digest's own place, and the curves but for times."""
    (step, content), (other_step, other) = (RunDirectory(str(run)).newest_state() for run in (one, two))
    assert step == other_step and content == other
    assert rows_of(one) == rows_of(two)


@pytest.fixture(scope="module")
def local_run(data_dir, tmp_path_factory):
    """A run of 8 steps in a local folder."""
    folder = tmp_path_factory.mktemp("local") / "run"
    dataset = read_dataset(str(data_dir))
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch.setattr)
        train(config_of(dataset), dataset, str(folder))
    return folder


def test_a_run_in_a_bucket_is_the_local_one_bit_for_bit(data_dir, local_run, memory, small_networks):
    bucket = fsspec.filesystem("memory")
    bucket.put(str(data_dir), "/b/records", recursive=True)
    dataset = on_this_machine(read_dataset(f"{memory}/records"))
    train(config_of(dataset), dataset, f"{memory}/runs/a")
    assert_equal_runs(local_run, f"{memory}/runs/a")
    names = {path.rpartition("/")[2].split("tfevents")[0] for path in bucket.find("/b/runs/a")}
    assert names == {path.name.split("tfevents")[0] for path in local_run.iterdir()} - {".lock"}
    assert [run.path for run in find_runs(memory)] == [f"{memory}/runs/a"]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The URL of an empty bucket on moto's server, which programs find by their environment."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        url = f"http://localhost:{probe.getsockname()[1]}"
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as file, pytest.MonkeyPatch.context() as patch:
        command = [sys.executable, "-m", "moto.server", "-p", url.rpartition(":")[2]]
        server = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(url):
                    break
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            for name, value in {"ENDPOINT_URL": url, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
                patch.setenv(f"AWS_{name}", value)
            fsspec.filesystem("s3").mkdir("bucket")
            yield "s3://bucket"
        finally:
            server.kill()
            server.wait()


def checkpoints(run):
    return [step for step, path in states(run) if "checkpoint" in path]


@pytest.mark.needs("flask", "moto", "s3fs")
@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_in_an_object_store_goes_on_there_bit_for_bit(data_dir, s3, tmp_path, kills):
    """Both runs are programs: in this process, TensorFlow may have begun with another number of threads."""
    settings = {**SETTINGS, "steps": 8 + 8 * kills, "checkpoint_every": 2}
    train = ["-m", "launch.train", "--variant=bn_x5", *(f"--{name}={value}" for name, value in settings.items())]
    done = run_program(*train, f"--data_dir={data_dir}", f"--workdir={tmp_path / 'undisturbed'}", small=True)
    assert done.returncode == 0, done.stderr
    fsspec.filesystem("s3").put(str(data_dir), f"{s3}/records", recursive=True)
    run, random = f"{s3}/{kills}", np.random.default_rng(kills)
    command = [*train, f"--data_dir={s3}/records", f"--workdir={run}", f"--cache={tmp_path / 'cache'}"]
    for _ in range(kills):
        before = checkpoints(run)
        with start_program(*command, small=True, env={**os.environ}) as process:
            while checkpoints(run) == before:
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            time.sleep(random.uniform(0, 0.3))  # 8 steps and their puts are longer
            process.kill()
            process.communicate()
    done = run_program(*command, small=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert_equal_runs(tmp_path / "undisturbed", run)
    assert not [path for path in fsspec.filesystem("s3").find(run) if "unfinished" in path]
    for arguments in (
        ["evaluate", f"--workdir={run}", f"--data_dir={s3}/records", f"--cache={tmp_path / 'cache'}"],
        ["report", f"--workdir={s3}/{kills}"],
    ):
        done = run_program("-m", f"launch.{arguments[0]}", *arguments[1:], small=True, env={**os.environ})
        assert done.returncode == 0, done.stderr
    (result,) = json.loads(storage.read(f"{run}/evaluation.json"))["results"]
    assert result["top1"] == rows_of(run)[-1]["top1"]


@pytest.mark.needs("flask", "moto", "s3fs")
def test_a_process_reads_a_bucket_that_its_parent_had_read_before_it_forked(s3):
    """As a worker of a cluster does: `peers.watched` forks after the run's configuration was read."""
    write_text(f"{s3}/text", "one")
    code = f"""
import os
from bn_keras import storage
storage.read("{s3}/text")
if child := os.fork():
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(storage.read("{s3}/text").decode())
"""
    done = run_program("-c", code, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "one\n"), done.stderr


@pytest.fixture(params=["folder", "bucket"])
def place(request, tmp_path):
    """A folder that is not there yet, on the disk or in memory's bucket."""
    if request.param == "folder":
        return str(tmp_path / "x")
    return f"{request.getfixturevalue('memory')}/x"


def test_a_folder_and_a_bucket_do_the_same(place):
    assert not storage.exists(place) and not storage.is_folder(place) and storage.files(place) == {}
    storage.make_folder(f"{place}/y")
    for name, text in (("a.txt", "one"), ("y/b.txt", "two")):
        write_text(f"{place}/{name}", text)
    assert storage.is_folder(f"{place}/y") and storage.exists(f"{place}/a.txt")
    assert storage.read(f"{place}/a.txt") == b"one" and storage.file_size(f"{place}/a.txt") == 3
    assert {path for path in storage.find(place) if path.endswith("txt")} == {f"{place}/a.txt", f"{place}/y/b.txt"}
    first = storage.files(place)
    assert [*first] == ["a.txt"]
    write_text(f"{place}/a.txt", "two")
    assert storage.files(place) != first
    with pytest.raises(ZeroDivisionError), replacing(f"{place}/a.txt") as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise ZeroDivisionError
    assert storage.read(f"{place}/a.txt") == b"two" and [*storage.files(place)] == ["a.txt"]
    with storage.local(f"{place}/y/b.txt") as path, open(path) as file:
        assert file.read() == "two"
    storage.remove(f"{place}/a.txt")
    assert storage.file_size(f"{place}/a.txt") is None
    with pytest.raises(FileNotFoundError):
        storage.read(f"{place}/a.txt")
    with pytest.raises(InputError, match=r"y is no regular file"):
        storage.file_size(f"{place}/y")


def test_the_trace_of_the_profiler_lies_in_the_bucket(memory):
    outbox = storage.Outbox(f"{memory}/run")
    os.makedirs(f"{outbox.path}/plugins/profile")
    write_text(f"{outbox.path}/plugins/profile/trace", "x")
    outbox.send()
    assert storage.read(f"{memory}/run/plugins/profile/trace") == b"x"


def test_a_bucket_without_a_manifest_is_refused(memory):
    write_text(f"{memory}/x/train-00000-of-00001", "")
    with pytest.raises(InputError, match=r"memory://b/x has no dataset.json: only data_prep's folders are read"):
        read_dataset(f"{memory}/x")
