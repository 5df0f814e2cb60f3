"""Small color sets, such as CIFAR-10 in class folders: their recipe, and images that are moved and mirrored."""

import dataclasses
import math
import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import make_run_config, run_plan, run_program
from PIL import Image

from bn_keras import InputError, read_dataset
from bn_keras.evaluation.trained_network import image_view
from bn_keras.input import preprocessing
from bn_keras.input.dataset import Shard
from bn_keras.input.options import InputOptions
from bn_keras.input.pipeline import training_batches, validation_batches
from bn_keras.networks.variants import VARIANTS
from bn_keras.training.recipes import PAPER, make_config, recipe_for


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """Records of 32x32 color PNGs, three classes: 30 to train, 6 to validate."""
    folder = tmp_path_factory.mktemp("colors")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("validation", 2)):
        for channel, name in enumerate(("red", "green", "blue")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 100, (32, 32, 3))
                pixels[..., channel] += 150
                Image.fromarray(pixels.astype("uint8")).save(folder / split / name / f"{number}.png")
    flags = [f"--{split}={folder / split}" for split in ("train", "validation")]
    done = run_program("-m", "data_prep", *flags, f"--output_dir={folder / 'records'}")
    assert done.returncode == 0, done.stderr
    return folder / "records"


def test_a_shifted_image_is_a_window_of_the_reflected_one_or_its_mirror():
    size, margin = 32, 4
    original = (np.add.outer(np.arange(size) * 7, np.arange(size)) % 251).astype("uint8")[..., None]
    encoded = tf.io.encode_png(original)
    padded = np.pad(original, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    windows = {
        padded[y : y + size, x : x + size, 0][:, ::step].tobytes(): (y, x, step)
        for y in range(2 * margin + 1)
        for x in range(2 * margin + 1)
        for step in (1, -1)
    }
    shift = tf.function(lambda draws: preprocessing.shifted_image(encoded, draws, image_size=size, channels=1))
    shifted = [shift(preprocessing.uniform_draws((seed, 0))).numpy()[..., 0].astype("uint8") for seed in range(100)]
    seen = {windows[image.tobytes()] for image in shifted}
    assert {step for _, _, step in seen} == {1, -1}
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(2 * margin + 1))


def test_shifts_keep_the_colors_and_evaluation_sees_the_whole_image(colors):
    dataset = read_dataset(str(colors))
    shift, plain = (InputOptions(32, augmentation, photometric_distortion="full") for augmentation in ("shift", "none"))
    images, labels = next(iter(training_batches(dataset, shift, batch_size=6, seed=0)))
    order = [dataset.class_names.index(name) for name in ("red", "green", "blue")]
    brightest = np.argmax(images.numpy().mean((1, 2)), axis=-1)
    np.testing.assert_array_equal([order[channel] for channel in brightest], labels.numpy())
    evaluated, expected = (next(iter(validation_batches(dataset, view, batch_size=6)))[0] for view in (shift, plain))
    np.testing.assert_array_equal(evaluated.numpy(), expected.numpy())


@pytest.mark.parametrize("augmentation", ["imagenet", "shift", "none"])
def test_evaluate_predict_and_export_show_the_network_what_training_evaluates_on(image_folders, data_dir, augmentation):
    dataset = read_dataset(str(data_dir))
    config = make_run_config(augmentation=augmentation, image_size=32)
    view = image_view(config)
    evaluated = next(iter(validation_batches(dataset, InputOptions(32, augmentation), batch_size=21)))[0].numpy()
    shown = set()
    for path in (image_folders / "validation").glob("*/*.png"):
        shown.add(preprocessing.to_network_range(view(path.read_bytes())).numpy().tobytes())
        with Image.open(path) as image:
            margin = 0 if augmentation != "imagenet" else (20 - round(0.875 * 20)) // 2
            crop = image.convert("F").crop((margin, margin, 20 - margin, 20 - margin))
        by_pillow = np.asarray(crop.resize((32, 32), Image.BILINEAR))
        np.testing.assert_allclose(view(path.read_bytes())[..., 0], by_pillow, atol=1e-3)
    assert shown == {image.tobytes() for image in evaluated}


def test_small_color_images_are_shifted_and_mirrored_and_small_gray_ones_are_not(colors, data_dir):
    assert make_config(read_dataset(str(colors)), "bn_x5").augmentation == "shift"
    assert make_config(read_dataset(str(data_dir)), "bn_x5").augmentation == "none"


def images_of(colors, count):
    """A data set of so many larger images."""
    splits = {"train": (Shard("", count, 0),), "validation": (Shard("", 7, 0),)}
    return dataclasses.replace(read_dataset(str(colors)), median_short_side=375, splits=splits)


def decay_epochs(colors, images, variant, **changes):
    return make_config(images_of(colors, images), variant, **changes).variant.decay_epochs


@pytest.mark.parametrize(("images", "recipe"), [(500, "the small photo set's"), (1_281_167, PAPER)])
def test_only_sets_of_imagenets_size_get_the_papers_recipe(colors, images, recipe):
    assert recipe_for(images_of(colors, images)) == recipe


@pytest.mark.parametrize("name", ["bn_x5", "inception"])
def test_on_imagenet_a_run_differs_from_the_papers_defaults_in_nothing(colors, name):
    config = make_config(images_of(colors, 1_281_167), name)
    assert config.variant == VARIANTS[name] and config.steps == VARIANTS[name].steps
    of_data = {"dataset", "dataset_fingerprint", "train_examples", "validation_examples", "classes", "channels"}
    own = {field.name for field in dataclasses.fields(config)} - of_data - {"variant", "steps"}
    assert {name: getattr(config, name) for name in own} == {
        field.name: field.default for field in dataclasses.fields(config) if field.name in own
    }


def test_few_images_are_seen_at_most_320_times_and_evaluated_as_often(colors):
    many, few = (make_config(images_of(colors, images), "bn_x5") for images in (1_000, 100))
    assert (many.steps, many.eval_every) == (5_000, 250) and (few.steps, few.eval_every) == (1_000, 50)
    earlier = dataclasses.replace(few, steps=5_000)
    assert make_config(images_of(colors, 100), "bn_x5", continued=earlier).steps == 5_000, "a run goes on as it began"


@pytest.mark.parametrize("images", [60, 167, 1_000])
@pytest.mark.parametrize("name", ["bn_x5", "bn_x30"])
def test_the_rate_of_a_small_set_ends_at_1_percent_of_its_start(colors, images, name):
    config = make_config(images_of(colors, images), name)
    decays = math.floor((config.steps - 1) * 32 / images / config.variant.decay_epochs)  # by the last step
    assert 0.01 <= 0.96**decays < 0.011


def test_where_the_rate_ends_higher_anyway_the_schedule_is_the_papers(colors):
    assert decay_epochs(colors, 1_600, "bn_x5") == VARIANTS["bn_x5"].decay_epochs


def test_the_papers_recipe_keeps_the_papers_schedule(colors):
    assert decay_epochs(colors, 1_281_167, "bn_x30", steps=100_000_000) == VARIANTS["bn_x30"].decay_epochs
    # 6 million steps of 32 of 1,281,167 images are 149.9 epochs, a decay each 1 1/3: 112.
    assert math.floor(6_000_000 * 32 / 1_281_167 / VARIANTS["bn_x30"].decay_epochs) == 112


@pytest.mark.parametrize("images", [500, 1_281_167])
def test_another_schedule_than_the_variants_is_as_long_as_the_run(colors, images):
    for variant, schedule in (("bn_x5", "cosine"), ("bn_x5", "steps"), ("resnet50", "cosine")):
        nine = 9 * decay_epochs(colors, images, variant, steps=90_000, schedule=schedule)
        assert nine == pytest.approx(90_000 * 32 / images, rel=1e-4)


def test_a_batch_twice_as_large_takes_half_the_steps_unless_they_are_given(colors):
    assert make_config(images_of(colors, 500), "bn_x5", batch_size=64).steps == 2_500
    assert make_config(images_of(colors, 500), "bn_x5", batch_size=64, steps=7).steps == 7


@pytest.mark.parametrize("name", ["classes", "sharpness"])
def test_what_is_no_setting_of_a_run_is_refused(colors, name):
    with pytest.raises(InputError, match=f"`{name}=3` is no setting of a run"):
        make_config(read_dataset(str(colors)), "bn_x5", **{name: 3})


def planned_rates(data_dir, workdir, *flags):
    """First and last rate of the plan, and all that it says."""
    command = ["--variant=bn_x5", f"--data_dir={data_dir}", f"--workdir={workdir}", "--width=0.1", "--image_size=32"]
    done = run_plan(*command, "--batch_size=10", *flags)
    assert done.returncode == 0, done.stderr
    first, last = re.search(r"learning rate ([\d.e-]+) \(.*\) to ([\d.e-]+),", done.stdout).groups()
    return float(first), float(last), done.stdout


def test_the_plan_says_the_first_and_the_last_rate_and_its_advice_about_a_rate_that_dies_works(colors, tmp_path):
    first, last, said = planned_rates(colors, tmp_path / "run", "--steps=3000")  # a thousand epochs
    assert 0.01 < last / first < 0.011 and "falls below" not in said
    # 30 images are an epoch, so 60 a decay.
    first, last, said = planned_rates(colors, tmp_path / "run", "--steps=3000", "--decay_epochs=2")
    assert last == pytest.approx(first * 0.96 ** (2999 * 10 // 60), rel=1e-2)
    advice = re.search(r"falls below 1% of its start: (--decay_epochs=\S+)", said).group(1)
    first, last, said = planned_rates(colors, tmp_path / "run", "--steps=3000", advice)
    assert last / first >= 0.01 and "falls below" not in said


def test_a_small_network_takes_one_thread_for_an_operation_and_a_run_keeps_what_it_began_with(colors):
    dataset = read_dataset(str(colors))
    config = make_config(dataset, "bn_x5")
    assert config.image_size * config.width == 16 and config.threads == 1
    assert make_config(dataset, "bn_x5", width=0.5).threads is None
    for begun in (2, None):  # None: of an earlier version
        continued = dataclasses.replace(config, threads=begun)
        assert make_config(dataset, "bn_x5", continued=continued).threads == begun
