"""launch/show_input draws what the network is fed; launch/benchmark_input names the slowest stage."""

import json
import re
import shutil
import socket
import time

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run_config, run_program, start_program
from PIL import Image

from bn_keras import read_dataset
from bn_keras.input import run_batches
from bn_keras.input.contact_sheet import contact_sheet
from bn_keras.input.options import InputOptions
from bn_keras.input.pipeline import training_batches
from bn_keras.input.speed import seconds_per_image, stage_rates
from bn_keras.runs import checkpoint
from bn_keras.runs.run_directory import RunDirectory


def test_a_contact_sheet_holds_the_images_pixel_for_pixel():
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype("float32")
    sheet = np.asarray(contact_sheet(images / 127.5 - 1, list("abcde"), title="t", columns=4, tile=8))
    tops = 15 + 12, 15 + 12 + 8 + 30 + 6
    for number, image in enumerate(images):
        left, top = 6 + number % 4 * 14, tops[number // 4]
        np.testing.assert_array_equal(sheet[top : top + 8, left : left + 8], image)


def test_captions_are_drawn_and_long_ones_take_two_lines():
    black = np.full((2, 4, 4, 1), -1.0)
    sheet = np.asarray(contact_sheet(black, ["", "great white shark, Carcharodon"], title="", columns=2, tile=100))
    captions = sheet[15 + 12 + 100 :]
    assert (captions[:, :106] == 255).all()
    assert (captions[:15, 106:] < 128).any() and (captions[15:30, 106:] < 128).any()


def test_show_input_draws_the_first_training_batch(data_dir, tmp_path):
    output = tmp_path / "sheet.png"
    done = run_program(
        "-m", "launch.show_input", f"--data_dir={data_dir}", "--variant=inception", "--augmentation=imagenet",
        "--images=3", "--image_size=160", "--seed=5", "--step=2", f"--output={output}", warm=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    sheet = np.asarray(Image.open(output))
    options = InputOptions(160, shuffling="shard_order", photometric_distortion="full")
    images, _ = next(iter(training_batches(read_dataset(str(data_dir)), options, batch_size=3, seed=5, start_step=2)))
    for number, image in enumerate(images.numpy()):
        tile = sheet[27 : 27 + 160, 6 + number * 166 : 166 + number * 166]
        np.testing.assert_allclose(tile / 127.5 - 1, np.broadcast_to(image, (160, 160, 3)), atol=0.5 / 127.5 + 1e-6)


def test_benchmark_input_names_stages_and_bottleneck(data_dir):
    done = run_program(
        "-m", "launch.benchmark_input", f"--data_dir={data_dir}", "--augmentation=imagenet", "--seconds=0.2", warm=True
    )
    assert done.returncode == 0, done.stderr
    stages = ("reading", "decoding, cropping, resizing", "distortion")
    assert all(re.search(rf"^{stage} +[\d,]+ +[\d.]+$", done.stdout, re.MULTILINE) for stage in stages)
    assert re.search(f"bottleneck: ({'|'.join(stages)}); ", done.stdout)


def test_a_stages_rate_is_that_of_a_pipeline_whose_seconds_are_known(monkeypatch, data_dir):
    made = []

    def slowly():
        while True:
            time.sleep(0.1)
            made.append(time.perf_counter())  # on a busy machine a sleep is longer
            yield np.zeros(8)

    batches = tf.data.Dataset.from_generator(slowly, output_signature=tf.TensorSpec((8,), tf.float64)).prefetch(2)
    monkeypatch.setattr(run_batches, "training_batches", lambda *_, **__: batches)
    config = make_run_config(batch_size=8, augmentation="none")
    rates = stage_rates(run_batches.RunBatches(config, read_dataset(str(data_dir))), seconds=2)
    assert rates["decoding, cropping, resizing"] == pytest.approx(8 / np.mean(np.diff(made)), rel=0.1)


def test_a_stages_time_is_what_it_adds():
    assert seconds_per_image({"a": 10.0, "b": 5.0, "c": 5.0}) == pytest.approx({"a": 0.1, "b": 0.1, "c": 0.0})


@pytest.mark.parametrize("program", ["show_input", "benchmark_input"])
def test_a_missing_folder_is_one_line(program):
    done = run_program("-m", f"launch.{program}", "--data_dir=/nowhere")
    assert (
        done.returncode == 1
        and done.stderr.startswith(f"{program}: no folder /nowhere")
        and done.stderr.count("\n") == 1
    )


def test_a_service_at_a_port_that_another_program_holds_is_one_line():
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        done = run_program("-m", "launch.data_service", f"--port={port}", warm=True, timeout=100)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"data_service: --port={port} cannot be")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_training_on_batches_of_a_service_is_bit_for_bit_training_on_ones_own(data_dir, tmp_path):
    """A service that leaves out records too, as the trainer then counts."""
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    damage_first_record(copy / "train-00003-of-00006")
    command = [
        "-m", "launch.train", "--variant=bn_x5", f"--data_dir={copy}", "--width=0.1", "--image_size=32", "--steps=4",
        "--batch_size=30", "--augmentation=imagenet", "--distort_on=device", "--on_bad=skip",
    ]  # fmt: skip
    service = start_program("-m", "launch.data_service", "--port=0")
    try:
        address = re.search(r"--data_service=\S+", service.stdout.readline())[0]
        runs = [
            run_program(*command, f"--workdir={tmp_path / name}", *more, small=True)
            for name, more in (("served", [address]), ("own", []))
        ]
    finally:
        service.kill()
        service.communicate()
    assert [run.returncode for run in runs] == [0, 0], [run.stderr for run in runs]
    assert all("10 records were left out" in run.stdout for run in runs)
    (_, served), (_, own) = (checkpoint.load_newest(str(tmp_path / name)) for name in ("served", "own"))
    for name, array in own.items():
        np.testing.assert_array_equal(served[name], array, err_msg=name)


WATCH = """
import socket, sys, time
from launch import peers
listener = socket.create_server(("localhost", 0))
address = f"localhost:{listener.getsockname()[1]}"
peers.watch_services(address, 0.1)
time.sleep(1)
print(address, file=sys.stderr)
listener.close()
time.sleep(3)
"""


def test_a_service_that_no_longer_answers_is_named_until_it_does_ever_more_rarely():
    first, *others = run_program("-c", WATCH).stderr.splitlines()
    advice = "end this program, start launch/data_service there, and the same command continues"
    assert set(others) == {f"waiting for {first} (Connection refused): {advice}"}
    assert 2 <= len(others) <= 6  # after 0.1, 0.2, 0.4, 0.8 and 1.6 s


@pytest.mark.slow
def test_the_advice_about_a_service_that_dies_in_training_works(data_dir, tmp_path):
    command = [
        "-m", "launch.train", "--variant=bn_x5", f"--data_dir={data_dir}", f"--workdir={tmp_path}", "--width=0.1",
        "--image_size=32", "--steps=100000", "--batch_size=30", "--checkpoint_every=1",
    ]  # fmt: skip

    def serve(port):
        service = start_program("-m", "launch.data_service", f"--port={port}")
        return service, re.search(r"localhost:(\d+)", service.stdout.readline())[1]

    def until_trained_beyond(step, trainer):
        while (RunDirectory(str(tmp_path)).newest_step() or 0) <= step:
            assert trainer.poll() is None, trainer.communicate()
            time.sleep(0.1)

    service, port = serve(0)
    command.append(f"--data_service=localhost:{port}")
    trainer = start_program(*command)
    until_trained_beyond(0, trainer)
    service.kill()
    service.communicate()
    assert any(line.startswith(f"waiting for localhost:{port} (Connection refused)") for line in trainer.stderr)
    trainer.terminate()
    trainer.communicate()
    reached = RunDirectory(str(tmp_path)).newest_step()
    service, _ = serve(port)
    trainer = start_program(*command)
    until_trained_beyond(reached, trainer)
    for process in (trainer, service):
        process.kill()
        process.communicate()


def damage_first_record(shard):
    content = bytearray(shard.read_bytes())
    content[20] ^= 1
    shard.write_bytes(content)


def test_training_takes_a_cache_and_damaged_records(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    shard = copy / "train-00003-of-00006"
    damage_first_record(shard)
    command = [
        "-m", "launch.train", "--variant=bn_x5", f"--data_dir={copy}", "--width=0.1", "--image_size=32", "--steps=2",
        "--batch_size=30", "--augmentation=imagenet",
    ]  # fmt: skip
    done = run_program(*command, f"--workdir={tmp_path / 'fail'}", small=True)
    assert done.returncode == 1 and f"record 0 of {shard}, at byte 0, cannot be used" in done.stderr
    done = run_program(
        *command,
        f"--workdir={tmp_path / 'skip'}",
        f"--cache={tmp_path / 'cache'}",
        "--on_bad=skip",
        "--distort_on=device",
        small=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"left out: record \d of \S*cache\S*train-00003-of-00006", done.stderr)) == 10
    assert re.search(r"^10 records were left out, first record \d of \S*train-00003-of-00006$", done.stdout, re.M)
    assert re.search(r"at most \d+ MB of records in memory", done.stdout)
    assert json.loads((tmp_path / "skip" / "run.json").read_text())["distort_on"] == "device"


@pytest.fixture
def no_image(data_dir, tmp_path):
    """Records of which the third of the second shard holds a TIFF; its path."""
    copy = shutil.copytree(data_dir, tmp_path / "no_image")
    shard = copy / "train-00001-of-00006"
    replace_image(shard, 2, b"II*\x00")
    return shard


def replace_image(shard, number, begin):
    """Overwrites the begin of a record's image, and its checksum with it."""
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(shard))]
    image = tf.train.Example.FromString(records[number]).features.feature["image/encoded"].bytes_list.value[0]
    records[number] = records[number].replace(image, begin.ljust(len(image), b"x"))
    with tf.io.TFRecordWriter(str(shard)) as writer:
        for record in records:
            writer.write(record)


PROGRAMS = {
    "train": ["--variant=bn_x5", "--width=0.1", "--image_size=32", "--batch_size=60", "--steps=1"],
    "show_input": ["--images=60", "--image_size=16"],
    "benchmark_input": ["--seconds=0.2", "--image_size=16"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_record_that_cannot_be_decoded_is_one_line_with_its_image_and_a_fix_that_works(no_image, tmp_path, program):
    target = {"train": "--workdir", "show_input": "--output"}.get(program)
    command = ["-m", f"launch.{program}", f"--data_dir={no_image.parent}", *PROGRAMS[program]]
    command += [f"{target}={tmp_path / 'new.png'}"] if target else []
    done = run_program(*command, small=True)
    (line,) = done.stderr.splitlines()[-1:]
    name = tf.train.Example.FromString(next(iter(tf.data.TFRecordDataset(str(no_image)).skip(2))).numpy())
    name = name.features.feature["image/filename"].bytes_list.value[0].decode()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{program}: record 2 of {no_image}, at byte " in line and f" image {name}, cannot be used" in line
    fix = re.search(r"leave it out with (--\S+?),", line)[1]
    done = run_program(*command, fix, small=True)
    assert done.returncode == 0, done.stderr
    assert f"1 record was left out, first record 2 of {no_image}" in done.stdout


def test_a_sheet_of_evaluation_leaves_the_place_of_a_skipped_record_out(data_dir, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    replace_image(copy / "validation-00000-of-00002", 0, b"")
    command = ["-m", "launch.show_input", f"--data_dir={copy}", "--split=validation", "--images=5", "--on_bad=skip"]
    done = run_program(*command, f"--output={tmp_path / 'sheet.png'}", warm=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 images: ")
