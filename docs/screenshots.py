"""Pictures of TensorBoard, of the runs in a folder, as a browser shows them: `make screenshots`.

Needs the extra [screenshots] and a Chromium: that of `playwright install chromium`, or the program that the environment
variable CHROMIUM names.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

PAGES = {"custom_scalars": "tensorboard", "hparams": "tensorboard_hparams"}
"""TensorBoard's pages, and the pictures that they go to."""

PORT = 6055


def main(logdir, output_dir):
    """Draws each of PAGES into `output_dir`."""
    board = subprocess.Popen(
        [Path(sys.executable).with_name("tensorboard"), f"--logdir={logdir}", f"--port={PORT}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        next(line for line in board.stderr if "Press CTRL+C" in line)
        with sync_playwright() as playwright:
            chromium = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"), args=["--no-sandbox"])
            for page, name in PAGES.items():
                tab = chromium.new_page(viewport={"width": 1200, "height": 640})
                tab.goto(f"http://localhost:{PORT}/#{page}", wait_until="networkidle")
                tab.reload(wait_until="networkidle")  # the runs may not have been read when it was opened
                tab.wait_for_timeout(3_000)  # until the lines have been drawn
                picture = Image.open(io.BytesIO(tab.screenshot()))
                picture.quantize(64).save(Path(output_dir) / f"{name}.png", optimize=True)  # a third of the bytes
    finally:
        board.terminate()


if __name__ == "__main__":
    main(*sys.argv[1:])
