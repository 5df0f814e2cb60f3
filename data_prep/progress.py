"""Shows the progress of a conversion, images/s, MB/s, time left: one updated line on a terminal, else some lines."""

import multiprocessing
import sys
import time


class Counters:
    """How many images, bytes and bad images are done, shared so that any process may add to them.

    All three share one lock: with a lock for each, adding took 6 us for an image instead of 2.
    """

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.images, self.bytes, self.bad = (context.RawValue("q", 0) for _ in range(3))
        self._lock = context.Lock()

    def add(self, images: int, size: int, bad: int) -> None:
        with self._lock:
            self.images.value += images
            self.bytes.value += size
            self.bad.value += bad


class Progress:
    """Counts images and bytes, also those of worker processes, and prints at most every `period` seconds.

    Attributes:
      counters: the counters to which every process adds.
    """

    def __init__(self, images: int, size: int, counters: Counters):
        """`images` and `size` (in bytes) are the work of this run."""
        self._total_images, self._total_bytes = images, size
        self._terminal = sys.stderr.isatty()
        self._period = 0.5 if self._terminal else 10.0
        self.counters = counters
        self._start = self._last = time.monotonic()

    def tick(self, final: bool = False) -> None:
        """Prints the state if it is time to, or if it is the final one."""
        now = time.monotonic()
        if now - self._last < self._period and not final:
            return
        self._last = now
        seconds = max(now - self._start, 1e-9)
        done = self.counters.images.value
        left = "" if final or not done else f", {_duration(seconds * (self._total_images - done) / done)} left"
        line = (
            f"{done:,} of {self._total_images:,} images, {done / seconds:,.0f} images/s, "
            f"{self.counters.bytes.value / 1e6 / seconds:,.1f} MB/s{left}, {self.counters.bad.value} bad"
        )
        if self._terminal:
            sys.stderr.flush()
            sys.stderr.buffer.write(b"\r\x1b[K")  # `program` escapes what is printed
        print(line, end="\n" if final or not self._terminal else "", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
