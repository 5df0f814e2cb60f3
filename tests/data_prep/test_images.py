"""Which files are pictures, and what is stored of each kind, against numpy, Pillow's own resampling and TensorFlow."""

import collections
import importlib
import io
import itertools
import struct
import zlib
from pathlib import Path

import miniature_release
import numpy as np
import pytest
from independent_reader import examples
from PIL import Image, ImageCms

from data_prep import convert, plan, verify
from data_prep.errors import BadImageError, InputError
from data_prep.formats import image, png
from data_prep.sources import ilsvrc2012, image_folder

DRAW = np.random.default_rng(0)
COLOR = DRAW.integers(0, 256, (60, 80, 3), np.uint8)
WITH_ALPHA = DRAW.integers(0, 256, (60, 80, 4), np.uint8)
DEEP = np.arange(60 * 80, dtype=np.uint16).reshape(60, 80) * 13  # 0 to 62,387


def encoded(pixels, kind, **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def stored(content, name="a", **options):
    """What is stored of a file, and its pixels."""
    result = image.prepare(content, name, image.Storage(**options))
    with Image.open(io.BytesIO(result.encoded)) as picture:
        assert (picture.format, *picture.size, len(picture.getbands())) == result[1:5]
        return result, np.asarray(picture)


def written(output):
    """File name -> label and format of every record."""
    found = {}
    for shard in Path(output).glob("*-of-*"):
        for example in examples(shard):
            (name,), (label,), (kind,) = (example[f"image/{k}"] for k in ("filename", "class/label", "format"))
            found[name.decode()] = (label, kind.decode())
    return found


def write_folders(folder, files, validation=("ant", "bee")):
    """train/PATH for each of `files`, path -> content, and a JPEG in validation/CLASS for each of `validation`."""
    jpegs = {f"validation/{name}/v.jpg": encoded(COLOR, "JPEG") for name in validation}
    for path, content in ({f"train/{path}": content for path, content in files.items()} | jpegs).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return str(folder / "train"), str(folder / "validation")


def run(data, output, lines=None, **arguments):
    return convert.convert(data, str(output), log=(lines if lines is not None else []).append, **arguments)


KINDS = {  # ending, Pillow's format, what it is stored as
    "tif": ("TIFF", "PNG"),
    "avif": ("AVIF", "JPEG"),
    "ppm": ("PPM", "PNG"),
    "jp2": ("JPEG2000", "JPEG"),
    "ico": ("ICO", "PNG"),
    "tga": ("TGA", "PNG"),
    "webp": ("WEBP", "JPEG"),
    "GIF": ("GIF", "PNG"),
    "PNG": ("PNG", "PNG"),
    "JPG": ("JPEG", "JPEG"),
    "qoi": ("QOI", "PNG"),
}
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_every_kind_of_picture_is_converted_also_as_the_only_kind_of_a_class(tmp_path):
    files = {f"{ending}/1.{ending}": encoded(COLOR, kind) for ending, (kind, _) in KINDS.items()}
    source = write_folders(tmp_path, files, validation=("tif", "tga"))
    run(image_folder.dataset(*source), tmp_path / "out")
    labels = {name: 1 + index for index, name in enumerate(sorted(KINDS))}
    truth = {f"1.{ending}": (labels[ending], kind) for ending, (_, kind) in KINDS.items()}
    assert written(tmp_path / "out") == truth | {"v.jpg": written(tmp_path / "out")["v.jpg"]}


@pytest.mark.parametrize("archive", [False, True])
def test_a_name_that_does_not_say_is_decided_by_the_first_bytes(tmp_path, archive):
    kinds = ("TIFF", "AVIF", "PPM", "JPEG2000", "ICO", "WEBP", "GIF", "PNG", "JPEG", "BMP", "QOI")
    files = {f"ant/{kind}": encoded(COLOR, kind) for kind in kinds} | {"bee/photo.dat": encoded(COLOR, "JPEG")}
    files |= {"bee/README": b"Photos of bees", "bee/empty": b"", "ant/notes.txt": b"ants", "ant/Thumbs.db": b"\xd0\xcf"}
    source, lines = write_folders(tmp_path, files), []
    if archive:
        (tmp_path / "train.tar").write_bytes(miniature_release.tar_of(files))
        data = ilsvrc2012.dataset(ilsvrc2012.Release(str(tmp_path / "train.tar"), source[1]))
    else:
        data = image_folder.dataset(*source)
    run(data, tmp_path / "out", lines)
    assert written(tmp_path / "out").keys() == {*kinds, "photo.dat", "v.jpg"}
    (counted,) = (line for line in lines if "no image" in line)
    assert "11 without an ending, 1 .dat" in counted and "2 without an ending" in counted
    assert "1 .txt" in counted and "1 .db" in counted


@pytest.mark.needs("pillow_heif")
@pytest.mark.parametrize("pixels", [COLOR, WITH_ALPHA, COLOR[..., 0]], ids=["color", "transparent", "gray"])
def test_heic_is_decoded_where_its_extra_is_installed(tmp_path, pixels):
    heif = importlib.import_module("pillow_heif")
    heif.register_heif_opener()
    content = encoded(pixels, "HEIF", quality=90)
    source = write_folders(tmp_path, {"ant/1.heic": content, "bee/1.jpg": encoded(COLOR, "JPEG")})
    run(image_folder.dataset(*source), tmp_path / "out")
    assert (tmp_path / "out/repaired.tsv").read_text() == f"{source[0]}/ant/1.heic\tHEIF image\n"
    assert written(tmp_path / "out")["1.heic"] == (1, "JPEG")
    held = np.asarray(heif.open_heif(io.BytesIO(content)), int)
    if held.shape[-1] == 4:  # on white
        alpha = held[..., 3:] / 255
        held = held[..., :3] * alpha + 255 * (1 - alpha)
    result, shown = stored(content, "1.heic")
    assert np.abs(shown.reshape(held.shape) - held).mean() < 6  # noise at quality 95
    assert result.channels == (1 if pixels.ndim == 2 else 3)


@pytest.mark.parametrize("name", ["photo.heic", "photo.HEIF", "photo", "drawing.svg", "raw.cr2", "scan.jxl"])
def test_a_picture_that_cannot_be_decoded_is_bad_and_named(tmp_path, name):
    content = HEIC if "photo" in name else b"<svg/>"
    source = write_folders(tmp_path, {"ant/1.jpg": encoded(COLOR, "JPEG"), "bee/1.png": encoded(COLOR, "PNG")})
    (tmp_path / "train/bee" / name).write_bytes(content)
    data = image_folder.dataset(*source)
    with pytest.raises(InputError, match=f"bee/{name}: is .*(HEIC|no image of a known kind).*--on_bad=skip"):
        run(data, tmp_path / "out")
    lines = []
    run(data, tmp_path / "out", lines, on_bad="skip")
    (done,) = (line for line in lines if line.startswith("done"))
    assert "1 (1 is " in done and "bad left out" in done
    assert name in (tmp_path / "out/bad.tsv").read_text()


@pytest.mark.parametrize(
    ("content", "what"),
    [({}, "nothing in it"), ({"notes.txt": b"x", "list.csv": b"x"}, "1 .csv, 1 .txt"), ({"empty": b""}, "1 without")],
)
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("archive", [False, True])
def test_a_class_without_an_image_is_named_and_no_label_shifts(tmp_path, content, what, split, archive):
    files = {"ant/1.jpg": encoded(COLOR, "JPEG"), "cow/1.jpg": encoded(COLOR, "JPEG")}
    source = write_folders(tmp_path, files, ("ant", "cow"))
    (tmp_path / split / "bee").mkdir()
    for name, text in content.items():
        (tmp_path / split / "bee" / name).write_bytes(text)
    data = image_folder.dataset(*source)
    if archive:
        import tarfile

        for part in ("train", "validation"):
            with tarfile.open(tmp_path / f"{part}.tar", "w") as tar:
                tar.add(tmp_path / part, part)
        data = ilsvrc2012.dataset(ilsvrc2012.Release(*(str(tmp_path / f"{p}.tar") for p in ("train", "validation"))))
    with pytest.raises(InputError, match=r"1 class\(es\) without an image: 'bee'") as refused:
        run(data, tmp_path / "out")
    assert split in str(refused.value) and all(part in str(refused.value) for part in what.split(", "))
    assert not list((tmp_path / "out").glob("*-of-*"))


@pytest.mark.parametrize("name", ["bee.tar.gz", "bee.zip", "bee.tgz", "bee.7z"])
def test_an_archive_in_place_of_a_class_folder_is_named(tmp_path, name):
    files = {"ant/1.jpg": encoded(COLOR, "JPEG"), "cow/1.jpg": encoded(COLOR, "JPEG"), name: b"\x1f\x8b"}
    source = write_folders(tmp_path, files, ("ant", "cow"))
    (tmp_path / "train.tar").write_bytes(miniature_release.tar_of({f"train/{k}": v for k, v in files.items()}))
    archive = ilsvrc2012.dataset(ilsvrc2012.Release(str(tmp_path / "train.tar"), source[1]))
    for data in (image_folder.dataset(*source), archive):
        with pytest.raises(InputError, match=f"without an image: '{name}'.*unpack"):
            run(data, tmp_path / "out")


def test_only_files_whose_ending_says_nothing_are_opened(tmp_path, monkeypatch):
    files = {"ant/1.jpg": encoded(COLOR, "JPEG"), "bee/1.png": encoded(COLOR, "PNG"), "bee/1.xml": b"<a/>"}
    source = write_folders(tmp_path, files | {"bee/unknown": b"x"})
    asked = []
    monkeypatch.setattr(image_folder.storage, "heads", lambda places: asked.extend(places) or [b"x"] * len(places))
    image_folder.dataset(*source).scan()
    assert asked == [(f"{source[0]}/bee/unknown", 0, 1)]


def test_class_folders_may_lie_in_folders_around_all_and_hold_folders(tmp_path):
    files = {f"photos/train/{name}/summer/{name}.jpg": encoded(COLOR, "JPEG") for name in ("ant", "bee")}
    (tmp_path / "photos.tar").write_bytes(miniature_release.tar_of(files | {"photos/train/ant/1.jpg": HEIC}))
    _, validation = write_folders(tmp_path, {})
    contents = ilsvrc2012.dataset(ilsvrc2012.Release(str(tmp_path / "photos.tar"), validation)).scan()
    assert contents.synsets == ["ant", "bee"]
    assert collections.Counter(i.synset for i in contents.images["train"]) == {"ant": 2, "bee": 1}


# Sixteen bits, transparency, palettes


@pytest.mark.parametrize("max_side", [0, 40])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "32-bit TIFF", "PPM"])
def test_16_bits_become_their_upper_8_losslessly(kind, max_side):
    pixels = {"big-endian TIFF": DEEP.astype(">u2"), "32-bit TIFF": DEEP.astype(np.int32)}.get(kind, DEEP)
    result, shown = stored(encoded(pixels, kind.split()[-1]), max_side=max_side)
    truth = (DEEP >> 8).astype(np.uint8)
    if max_side:
        truth = np.asarray(Image.fromarray(truth).resize((40, 30), Image.Resampling.LANCZOS))
    assert result.format == "PNG" and np.array_equal(shown, truth)


def test_floats_from_0_to_1_become_bytes_and_others_are_bad():
    fractions = (DEEP / np.float32(65535)).astype(np.float32)
    assert np.array_equal(stored(encoded(fractions, "TIFF"))[1], np.rint(255 * fractions))
    for pixels in (fractions * 255, fractions - 1, fractions * np.nan):
        with pytest.raises(BadImageError, match="floating-point pixels that are not from 0 to 1"):
            stored(encoded(pixels.astype(np.float32), "TIFF"))
    for pixels in (DEEP.astype(np.int32) << 14, -DEEP.astype(np.int32), (DEEP >> 8).astype(np.int32)):
        with pytest.raises(BadImageError, match="32 bits that are not of 16-bit range"):
            stored(encoded(pixels, "TIFF"))


@pytest.mark.parametrize("max_side", [0, 40])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "TGA"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_shows_white(mode, kind, max_side):
    picture = Image.fromarray(WITH_ALPHA).convert(mode)
    *values, alpha = np.moveaxis(np.asarray(picture, float), -1, 0)
    truth = np.rint(np.squeeze(np.stack([(v * alpha + 255 * (255 - alpha)) / 255 for v in values], -1)))
    result, shown = stored(encoded(picture, kind), "a.tga", max_side=max_side)
    assert (result.format, result.channels) == ("PNG", len(values))
    if max_side:
        truth = Image.fromarray(truth.astype(np.uint8)).resize((40, 30), Image.Resampling.LANCZOS)
    assert np.abs(shown - np.asarray(truth, float)).max() <= 1  # rounded once or twice


@pytest.mark.parametrize("max_side", [0, 40])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["P", "1"])
def test_palettes_and_single_bits_are_shrunk_as_the_colors_they_stand_for(mode, kind, max_side):
    picture = Image.fromarray(COLOR).convert(mode)
    truth = picture.convert("RGB" if mode == "P" else "L")
    if max_side:
        truth = truth.resize((40, 30), Image.Resampling.LANCZOS)
    result, shown = stored(encoded(picture, kind), "a", max_side=max_side)
    assert result.format == "PNG" and np.array_equal(shown, np.asarray(truth))


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
@pytest.mark.parametrize("max_side", [0, 40])
def test_a_transparent_entry_of_a_palette_shows_white(kind, max_side):
    picture = Image.fromarray(COLOR).quantize(16)
    truth = np.array(picture.convert("RGB"))
    truth[np.asarray(picture) == 3] = 255
    if max_side:
        truth = np.asarray(Image.fromarray(truth).resize((40, 30), Image.Resampling.LANCZOS))
    assert np.array_equal(stored(encoded(picture, kind, transparency=3), max_side=max_side)[1], truth)


@pytest.mark.parametrize(("mode", "transparent"), [("L", 7), ("RGB", (7, 7, 7)), ("1", 0)])
def test_a_transparent_color_shows_white(mode, transparent):
    pixels = np.full((9, 9, 3), 200, np.uint8)
    pixels[2:5] = 7
    picture = Image.fromarray(pixels).convert(mode, dither=Image.Dither.NONE)
    shown = stored(encoded(picture, "PNG", transparency=transparent))[1]
    assert (shown[2:5] == 255).all() and (shown[:2] == (255 if mode == "1" else 200)).all()


def test_of_several_pictures_in_a_file_the_first_is_stored():
    frames = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (250, 10)]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {})):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.abs(stored(content)[1].astype(int) - 250).max() <= 2, kind


def test_lab_and_ycbcr_become_rgb():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    smooth = np.kron(DRAW.integers(60, 200, (4, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    picture = Image.fromarray(smooth)
    for other in (ImageCms.profileToProfile(picture, *profiles, outputMode="LAB"), picture.convert("YCbCr")):
        result, shown = stored(encoded(other, "TIFF"))
        assert result.channels == 3 and np.abs(shown.astype(int) - smooth).max() <= 5  # a step of one in a or b


def test_what_no_encoder_takes_is_bad():
    with pytest.raises(BadImageError, match="70000 x 1 pixels cannot be encoded again"):
        stored(encoded(np.zeros((1, 70_000), np.uint8), "PNG"), "a.jpg")
    with pytest.raises(BadImageError, match="more than 1,000,000 a side"):
        stored(encoded(np.zeros((1, 1_500_000), np.uint8), "PNG"))


# PNG's texts, cut JPEGs, CMYK


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "text",
    [
        chunk(b"tEXt", b"key\0" + bytes(2 << 20)),
        chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(80 << 20))),
        chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
        chunk(b"iCCP", b"key\0\0" + zlib.compress(np.random.default_rng(0).bytes(2 << 20))),
        chunk(b"tEXt", b"key\0" + bytes(900_000)) * 60,
    ],
    ids=["tEXt", "zTXt", "iTXt", "iCCP", "many"],
)
def test_a_png_with_megabytes_of_text_is_stored_as_it_is(text):
    import tensorflow as tf

    plain, clear = encoded(COLOR, "PNG"), encoded(WITH_ALPHA, "PNG")
    content = plain[:33] + text + plain[33:]  # behind the header
    assert image.prepare(content, "a.png", image.Storage(decode=True)).encoded == content
    assert np.array_equal(tf.io.decode_png(content), COLOR)
    assert np.array_equal(stored(clear[:33] + text + clear[33:])[1], stored(clear)[1])


def jpegs():
    """JPEGs of noise and of smooth and flat areas, by all options of the encoder."""
    noise = DRAW.integers(0, 256, (100, 64, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(noise[:6, :6]).resize((64, 100), Image.Resampling.BICUBIC))
    for pixels, mode in itertools.product((noise, smooth, np.full_like(noise, 200)), ("L", "RGB", "CMYK")):
        for quality, subsampling, progressive, restart in itertools.product((30, 95), (0, 2), (0, 1), (0, 3)):
            options = {"quality": quality, "subsampling": subsampling, "restart_marker_blocks": restart}
            picture = Image.fromarray(pixels).convert(mode)
            yield encoded(picture, "JPEG", progressive=bool(progressive), optimize=bool(restart), **options)


def test_verify_decode_finds_coded_data_that_end_early_and_nothing_else():
    for content in jpegs():
        image.prepare(content, "a.jpg", image.Storage(decode=True))
        coded = content.index(b"\xff\xda")
        for share in (0.3, 0.5, 0.9):
            cut = content[: coded + int((len(content) - coded) * share)].removesuffix(b"\xff") + b"\xff\xd9"
            with pytest.raises(BadImageError):
                image.prepare(cut, "a.jpg", image.Storage(decode=True))


def test_verify_decode_finds_cut_jpegs_in_shards(tmp_path):
    whole = encoded(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8), "JPEG")
    cut = whole[: len(whole) // 2] + b"\xff\xd9"
    source = write_folders(tmp_path, {"ant/1.jpg": whole, "bee/1.jpg": cut})
    data = image_folder.dataset(*source)
    run(data, tmp_path / "out", options=plan.Options(train_shards=1))  # its headers are right, so it is stored
    findings, _ = verify.verify(str(tmp_path / "out"), decode=True, workers=1)
    assert len(findings) == 1 and "coded data that end before its pixels do" in findings[0]
    with pytest.raises(InputError, match=r"bee/1\.jpg: has coded data that end"):
        run(data, tmp_path / "decoded", options=plan.Options(decode=True))


def test_cmyk_is_decoded_as_tensorflow_does_with_and_without_adobes_marker():
    import tensorflow as tf

    blocks = np.kron(DRAW.integers(0, 256, (8, 8, 4)), np.ones((8, 8, 1))).astype(np.uint8)
    adobe = encoded(Image.frombytes("CMYK", (64, 64), blocks.tobytes()), "JPEG", quality=95)
    marker = adobe.index(b"\xff\xee")
    assert adobe[marker + 4 : marker + 9] == b"Adobe" and adobe[marker + 15] == 0
    ycck = adobe[: marker + 15] + b"\2" + adobe[marker + 16 :]
    plain = adobe[:marker] + adobe[marker + 16 :]
    short = adobe[: marker + 3] + b"\x0d" + adobe[marker + 4 : marker + 15] + adobe[marker + 16 :]
    for content in (adobe, ycck, plain, short):
        truth = tf.io.decode_jpeg(content, channels=3).numpy().astype(int)
        result, shown = stored(content, "a.jpg", quality=100)
        assert result.repaired == "CMYK"
        assert np.abs(shown - truth).mean() < 1  # of JPEG at quality 100; inverted values are off by 100
    rgb = encoded(blocks[..., :3].copy(), "JPEG", keep_rgb=True)  # Adobe's transform 0: not YCbCr
    assert stored(rgb, "a.jpg")[0].encoded == rgb
    assert np.abs(tf.io.decode_jpeg(rgb).numpy().astype(int) - np.asarray(image._decode(rgb)[0])).max() <= 1


def test_without_text_keeps_what_is_damaged_as_it_is():
    content = encoded(COLOR, "PNG")
    assert png.without_text(content) == content
    for length in range(0, len(content), 97):
        assert png.without_text(content[:length]) == content[:length]
