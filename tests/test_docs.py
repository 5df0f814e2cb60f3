"""The documentation: its links lead somewhere, its commands exist, its arithmetic is right."""

import dataclasses
import importlib.util
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import CLASSES, ROOT, run_program
from PIL import Image

from data_prep.convert import convert
from data_prep.verify import verify

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
WRITTEN_BY_PROGRAMS = {"results.md", "benchmarks.md"}  # may not have been made yet


def commands(page):
    """What the code blocks of a page have people run of this project, as lists of words."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    blocks = [text for language, text in found if not language]
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [
        line for line in lines if line and (line[0].startswith("launch/") or line[:3] == ["python", "-m", "data_prep"])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_inside_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists() or target.rpartition("/")[2] in WRITTEN_BY_PROGRAMS, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_its_program_accepts(page):
    for words in commands(page):
        program = ["-m", words[0].replace("/", ".")] if words[0].startswith("launch/") else words[1:3]
        given = words[1:] if words[0].startswith("launch/") else words[3:]
        # One flag too many ends a program after it has read those before it, and before any work.
        done = run_program(*program, *[word for word in given if word.startswith("-")], "--nonsense")
        assert "Unknown command line flag 'nonsense'" in done.stdout + done.stderr, (words, done.stderr)


def python_blocks(page):
    """The code blocks in Python of a page of docs/, in order."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_what_the_page_for_users_of_keras_says_is_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    *blocks, onnx = python_blocks("from_keras.md")
    names = {}
    for block in [*blocks, *([onnx] if importlib.util.find_spec("tf2onnx") else [])]:
        exec(block, names)  # each asserts what it says
    assert b"TFL3" in names["lite"][:8]


def test_the_speeds_of_the_page_for_users_of_keras_are_measured():
    page, measured = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("from_keras.md", "benchmarks.md"))
    rows = re.findall(r"^\| (TensorFlow|JAX) \| .* \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) == 8
    assert all(re.search(rf"^\|.*\| {re.escape(ratio)} \|", measured, re.MULTILINE) for _, ratio in rows)


def test_the_lines_of_python_that_train_a_network_of_ones_own_do(data_dir, tmp_path, monkeypatch, capsys):
    """Twice, as the page says that the same lines continue; then a program takes the run like any other."""
    (script,) = python_blocks("training.md")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist").symlink_to(data_dir)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        exec(script, {"__name__": "__main__"})
        assert capsys.readouterr().out == "Outcome.FINISHED\n"
    done = run_program("-m", "launch.evaluate", f"--workdir={tmp_path}/runs/mine", f"--data_dir={data_dir}")
    assert done.returncode == 0 and "21" in done.stdout, done.stderr


def test_the_map_names_files_that_exist_and_every_wing():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:bn_keras|data_prep|launch|tests)/[\w/.]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    wings = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "bn_keras").glob("*/__init__.py")}
    assert wings <= named


def test_the_commands_of_the_guides_table_find_what_they_run():
    """Tests are only collected, and the steps of make only printed: they would run this suite in itself."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    commands = re.findall(r"`((?:python|make) .*?)`", text.partition("## Set up")[2].partition("## Add")[0])
    assert len(commands) == 6
    for program, *arguments in map(shlex.split, commands):
        command = (
            [sys.executable, *arguments, "--collect-only", "-q"] if program == "python" else ["make", "-n", *arguments]
        )
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr)


def test_a_variant_is_added_as_the_guide_says():
    exec(python_blocks("../CONTRIBUTING.md")[0], {})


def test_a_network_is_added_as_the_guide_says(monkeypatch):
    from bn_keras import VARIANTS, build_network

    module = types.ModuleType("bn_keras.networks.plain")
    exec(python_blocks("../CONTRIBUTING.md")[1], module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = dataclasses.replace(VARIANTS["bn_x5"], name="plain", title="Plain", network="plain")
    model = build_network(row, image_size=32, width=0.5, classes=3, momentum=0.9)
    assert model.output_shape == (None, 3) and model.get_layer("conv2_conv").filters == 64
    assert model.get_layer("conv1_bn").momentum == 0.9


def test_a_form_of_images_is_added_as_the_guide_says(image_folders, tmp_path):
    names = {}
    exec(python_blocks("../CONTRIBUTING.md")[2], names)
    files = sorted(image_folders.rglob("*.png"))
    rows = [f"{file.relative_to(image_folders)},{file.parent.name},{file.parent.parent.name}" for file in files]
    shutil.copytree(image_folders, tmp_path / "images")
    (tmp_path / "images" / "labels.csv").write_text("\n".join(rows))
    done = []
    convert(names["dataset"](str(tmp_path / "images")), str(tmp_path / "records"), log=done.append)
    assert verify(str(tmp_path / "records"), decode=False, workers=1) == ([], len(files)), done


def test_a_program_is_added_as_the_guide_says(data_dir, tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "classes.py").write_text(python_blocks("../CONTRIBUTING.md")[3])
    done = run_program(tmp_path / "launch" / "classes.py", f"--data_dir={data_dir}")
    assert done.returncode == 0 and done.stdout.split() == list(CLASSES), done.stderr


def test_every_program_of_the_checkout_is_installed_too():
    (listed,) = re.findall(r"^PROGRAMS = \[(.*?)^\]", (ROOT / "setup.py").read_text(), re.DOTALL | re.MULTILINE)
    programs = {path.stem for path in (ROOT / "launch").glob("*.py") if path.with_suffix("").exists()}
    assert set(re.findall(r'"(\w+)"', listed)) == programs


def test_the_lesson_is_kept_without_what_it_printed():
    """CI runs it: `make lesson-check`."""
    lesson = json.loads((ROOT / "docs" / "lesson.ipynb").read_text(encoding="utf-8"))
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in lesson["cells"])


def test_the_multiply_adds_of_the_tutorial_are_those_of_figure_5():
    from bn_keras import build_network

    total = 0
    for layer in build_network("bn_x5", image_size=224, classes=1000).layers:
        for kernel in (weight for weight in layer.weights if "kernel" in weight.path):
            positions = np.prod(layer.output.shape[1:3]) if len(kernel.shape) == 4 else 1
            total += int(positions * np.prod(kernel.shape))
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert f"3 x 2 x {total / 1e9:.2f}e9 = {6 * total / 1e9:.1f}e9" in text


def test_the_times_of_the_tutorial_follow_from_its_formula():
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| ([\d,]+)e12 \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) hours \| ([\d.]+) p \|", text)
    assert len(rows) == 4
    for peak, share, rate, hours, cost in rows:
        images_per_second = float(peak.replace(",", "")) * 1e12 * float(share) / 11.6e9
        assert float(rate.replace(",", "")) == pytest.approx(images_per_second, rel=0.01)  # printed with 2 or 3 digits
        assert float(hours) == pytest.approx(192e6 / images_per_second / 3600, rel=0.04)
        assert float(cost) == pytest.approx(float(hours), abs=0.5)


def test_the_cifar_page_turns_the_published_files_into_records(tmp_path):
    """On files of CIFAR-10's format with 3 random images each."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    names = ["airplane", "automobile", "bird"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for part in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        pixels = random.integers(0, 256, (3, 3072), "uint8")
        files = [f"{name}_{part}.png" for name in names]
        (folder / part).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2], "filenames": files}))
    done = run_program("-c", python_blocks("cifar10.md")[0], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = np.asarray(Image.open(tmp_path / "cifar10" / "validation" / "airplane" / "airplane_test_batch.png"))
    np.testing.assert_array_equal(first.transpose(2, 0, 1).reshape(-1), pixels[0])
    convert = next(words for words in commands(ROOT / "docs" / "cifar10.md") if words[0] == "python")
    done = run_program(*convert[1:], cwd=tmp_path)
    assert done.returncode == 0 and "15 train, 3 validation images" in done.stdout + done.stderr
