"""The programs: each has its flags, and a main short enough to read at a glance."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback before `program.run` handles it
