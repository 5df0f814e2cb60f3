"""Shows how far a run is and when it will end: one line that is updated on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sized

_PLAIN_EVERY = 30.0  # seconds between plain lines
_BAR = 24  # characters


class Progress:
    """Progress of one run on stderr.

    Args:
      name: the name of the run.
      steps: the step at which the run ends.
      skipped: records that were left out; their count is shown once it is not 0.
    """

    def __init__(self, name: str, steps: int, skipped: Sized | None = None):
        self._name, self._steps, self._skipped = name, steps, skipped
        self._accuracy = ""
        self._first: tuple[int, float] | None = None  # (step, time) after the first update, which holds the compilation
        self._last_line = time.monotonic()
        self._live = sys.stderr.isatty()

    def update(self, step: int) -> None:
        now = time.monotonic()
        self._first = self._first or (step, now)
        if self._live or now - self._last_line >= _PLAIN_EVERY:
            self._show(step, now)

    def evaluated(self, step: int, accuracy: float) -> None:
        self._accuracy = f"  validation accuracy {accuracy:.3f} at step {step}"
        self._show(step, time.monotonic())

    def close(self, message: str) -> None:
        print(f"{chr(10) if self._live else ''}{self._name}: {message}", file=sys.stderr, flush=True)

    def _show(self, step, now):
        first_step, first_time = self._first or (step, now)  # an evaluation may come first, where a run goes on
        left = (
            ""
            if step == first_step
            else f"  {clock((now - first_time) / (step - first_step) * (self._steps - step))} left"
        )
        filled = _BAR * step // self._steps
        bar = f"[{'#' * filled}{'.' * (_BAR - filled)}] " if self._live else ""
        skipped = f"  {len(self._skipped):,} records left out" if self._skipped else ""
        line = f"{self._name} {bar}{step}/{self._steps}{left}{self._accuracy}{skipped}"
        if self._live:
            sys.stderr.flush()
            sys.stderr.buffer.write(b"\r\x1b[K")  # our programs escape what is printed
        print(line, end="" if self._live else "\n", file=sys.stderr, flush=True)
        self._last_line = now


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours and days where there are any: "1:30", "2:00:05", "1 d 0:00:10"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + (
        f"{hours}:{minutes:02}:{seconds:02}" if days or hours else f"{minutes}:{seconds:02}"
    )
