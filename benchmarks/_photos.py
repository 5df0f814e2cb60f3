"""Made-up photographs for the benchmarks of files: no program, so not in the document."""

import io


def make_jpegs(count):
    """JPEGs of 500 x 375 pixels, ImageNet's median, and about 110 kB: blurred blocks under noise."""
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for _ in range(count):
        blocks = Image.fromarray(draw.integers(0, 256, (48, 64, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        noisy = np.clip(np.asarray(blocks, np.int16) + draw.integers(-21, 22, (375, 500, 3)), 0, 255)
        file = io.BytesIO()
        Image.fromarray(noisy.astype(np.uint8)).save(file, "JPEG", quality=92)
        yield file.getvalue()
