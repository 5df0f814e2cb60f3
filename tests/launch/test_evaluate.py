"""launch/evaluate on runs that launch/train made."""

import json
import shutil

import numpy as np
import pytest
from conftest import run_program

from bn_keras.runs import checkpoint
from bn_keras.runs.run_directory import RunDirectory
from bn_keras.runs.training_curve import TrainingCurve

COUNTS = ("top1", "top5", "of")


def final_counts(run):
    """Of the last evaluation in training."""
    row = [row for row in TrainingCurve(str(run / "curve.jsonl")).rows if row["kind"] == "validation"][-1]
    return tuple(row[k] for k in COUNTS)


def evaluate(data_dir, *flags):
    return run_program("-m", "launch.evaluate", f"--data_dir={data_dir}", *flags, small=True)


@pytest.fixture(scope="module")
def ensemble(data_dir, trained_runs, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluation")
    done = evaluate(
        data_dir,
        f"--workdir={trained_runs[0]},{trained_runs[1]}",
        "--protocol=single_crop",
        "--protocol=multicrop144",
        "--figure4",
        "--devices=2",  # training evaluated on one
        f"--output_dir={output}",
    )
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_by_one_crop_the_counts_are_those_that_training_saw(ensemble, trained_runs):
    results = json.loads((ensemble[0] / "evaluation.json").read_text())["results"]
    assert results[0]["networks"] == [str(trained_runs[0])] and results[0]["crops"] == 1
    assert tuple(results[0][k] for k in COUNTS) == final_counts(trained_runs[0])


def test_a_run_on_shifted_images_is_evaluated_as_training_evaluated_it(data_dir, tmp_path):
    done = run_program(
        "-m", "launch.train", "--variant=bn_x5", f"--data_dir={data_dir}", f"--workdir={tmp_path}", "--width=0.1",
        "--image_size=32", "--augmentation=shift", "--batch_size=16", "--steps=12", "--bn_momentum=0.5", small=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert evaluate(data_dir, f"--workdir={tmp_path}").returncode == 0
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert tuple(result[k] for k in COUNTS) == final_counts(tmp_path)


def test_members_and_ensemble_by_both_protocols(ensemble, trained_runs):
    output, printed = ensemble
    results = json.loads((output / "evaluation.json").read_text())["results"]
    both = list(map(str, trained_runs))
    assert [(r["networks"], r["crops"]) for r in results] == [
        *(([both[0]], 1), ([both[1]], 1), (both, 1)),
        *(([both[0]], 144), ([both[1]], 144), (both, 144)),
    ]
    assert all(r["of"] == 21 and 0 <= r["top1"] <= r["top5"] <= 21 for r in results)
    classes = json.loads((output / "evaluation.json").read_text())["classes"]
    assert [row["name"] for row in classes] == ["circle", "square", "stripe"]
    assert [row["examples"] for row in classes] == [7, 7, 7]
    assert sum(round(7 * row["recall"]) for row in classes) == results[-1]["top1"]
    assert "| circle | 7 |" in (output / "evaluation.md").read_text()
    table = (output / "figure4.md").read_text()
    assert table in printed and "| ensemble_5 | 144 | 1 |" in table and "beat its best member" in table
    assert {path.name for path in output.iterdir()} == {
        *("evaluation.json", "evaluation.md", "figure4.md"),
        *(
            f"{what}_{protocol}.png"
            for what in ("confusion", "mistakes")
            for protocol in ("single_crop", "multicrop144")
        ),
    }


def test_ones_own_classes_are_not_compared_with_the_papers(tmp_path, trained_runs, data_dir):
    done = evaluate(data_dir, f"--workdir={trained_runs[0]}", f"--output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "| square | 7 |" in done.stdout and "Paper" not in done.stdout
    assert not (tmp_path / "figure4.md").exists()


def test_population_statistics_are_algorithm_2s(data_dir, trained_runs):
    import keras

    from bn_keras import population_statistics
    from bn_keras.evaluation.trained_network import load_network
    from bn_keras.input.dataset_formats import read_dataset
    from bn_keras.input.options import InputOptions
    from bn_keras.input.pipeline import training_batches
    from bn_keras.input.run_batches import RunBatches

    run, dataset = RunDirectory(str(trained_runs[0])), read_dataset(str(data_dir))
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 1)).astype("float32")
    found = load_network(run, population_of=RunBatches(run.read_trained(), dataset), population_steps=3)(images)
    model = keras.models.load_model(trained_runs[0] / "model.keras")
    moving = model(images, training=False)
    batches = training_batches(dataset, InputOptions(32), batch_size=16, seed=0, start_step=12)
    population_statistics(model, batches, steps=3)
    np.testing.assert_allclose(found, model(images, training=False), rtol=1e-3, atol=1e-4)
    assert np.abs(found - moving).max() > 0.01
    np.testing.assert_allclose(load_network(run)(images), moving, rtol=1e-3, atol=1e-4)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1]), flip],
    ids=["missing", "cut", "flipped"],
)
def test_a_model_that_is_not_whole_is_made_from_the_newest_checkpoint(trained_runs, tmp_path, small_networks, damage):
    from bn_keras.evaluation.trained_network import load_network

    copy = shutil.copytree(trained_runs[0], tmp_path / "run")
    damage(copy / "model.keras")
    images = np.random.default_rng(0).normal(size=(3, 32, 32, 1)).astype("float32")
    expected, found = (load_network(RunDirectory(str(run)))(images) for run in (trained_runs[0], copy))
    np.testing.assert_array_equal(found, expected)


def test_a_run_that_was_extended_and_stopped_is_evaluated_at_its_newest_step(data_dir, trained_runs, tmp_path):
    """Its weights are those of step 12 with another bias of the classifier, by which one class is all answers."""
    copy = shutil.copytree(trained_runs[0], tmp_path / "run")
    _, arrays = checkpoint.load_newest(str(copy))
    (bias,) = [name for name, array in arrays.items() if name.startswith("model/") and array.shape == (3,)]
    checkpoint.save(str(copy), 20, arrays | {bias: np.float32([0, 1e6, 0]), "step": np.int64(20)})
    (copy / "run.json").write_text((copy / "run.json").read_text().replace('"steps": 12', '"steps": 24'))
    done = evaluate(data_dir, f"--workdir={copy}")
    assert done.returncode == 0 and f"{copy} is at step 20 of 24" in done.stderr, done.stderr
    result = json.loads((copy / "evaluation.json").read_text())["results"][0]
    assert (result["top1"], result["of"]) == (7, 21)  # 7 of each class
    (copy / "checkpoint-00000020.npz").write_bytes(b"PK")
    done = evaluate(data_dir, f"--workdir={copy}")
    result = json.loads((copy / "evaluation.json").read_text())["results"][0]
    assert tuple(result[k] for k in COUNTS) == final_counts(trained_runs[0])
    assert done.stderr.count("checkpoint-00000020.npz is damaged") == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (shutil.rmtree, "no run in"),
        (lambda run: (run / "model.keras").unlink(), "model.keras: it is written when training ends"),
        (lambda run: (run / "model.keras").write_bytes(b"PK"), "model.keras is damaged"),
        (lambda run: replace_in(run / "run.json", '"classes": 3', '"classes": 4'), "has classes 4, images"),
    ],
    ids=["missing", "unfinished", "damaged", "other_classes"],
)
def test_what_cannot_be_evaluated_is_one_clear_line(data_dir, trained_runs, tmp_path, change, message):
    copy = shutil.copytree(trained_runs[1], tmp_path / "run")  # which has no checkpoints
    change(copy)
    done = evaluate(data_dir, f"--workdir={copy}")
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_tf_slims_shards_are_evaluated_once_their_labels_are_known(data_dir, trained_runs, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "slim", ignore=shutil.ignore_patterns("*.json", ".data_prep"))
    flags = f"--workdir={trained_runs[0]}", f"--output_dir={tmp_path}"
    done = evaluate(copy, *flags)
    assert done.returncode == 1 and "give --label_base" in done.stderr
    done = evaluate(copy, *flags, "--label_base=1", "--classes=3")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "evaluation.json").read_text())["results"]
    assert tuple(result[k] for k in COUNTS) == final_counts(trained_runs[0])


@pytest.mark.slow
def test_a_damaged_record_is_named_or_left_out(data_dir, trained_runs, tmp_path):
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    shard = copy / "validation-00001-of-00002"
    content = bytearray(shard.read_bytes())
    content[-20] ^= 1
    shard.write_bytes(content)
    flags = f"--workdir={trained_runs[0]}", f"--output_dir={tmp_path}"
    done = evaluate(copy, *flags)
    assert done.returncode == 1 and f"record 10 of {shard}, at byte" in done.stderr
    assert "Traceback" not in done.stderr
    done = evaluate(copy, *flags, "--on_bad=skip")
    assert done.returncode == 0, done.stderr
    assert f"1 record was left out, first record 10 of {shard}" in done.stdout
    assert json.loads((tmp_path / "evaluation.json").read_text())["results"][0]["of"] == 20


def replace_in(path, before, after):
    path.write_text(path.read_text().replace(before, after))
