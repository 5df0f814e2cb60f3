"""Programs side by side: so many at once, each line behind a name, and one signal for all of them."""

import os
import signal
import threading
import time

import pytest
from conftest import run_program

from launch import jobs

PROGRAMS = {
    "meet": """
import pathlib, sys, time

own, other = map(pathlib.Path, sys.argv[1:])
own.touch()
end = time.monotonic() + 60
while not other.exists():
    assert time.monotonic() < end, "alone"
    time.sleep(0.01)
print("met", other.name)
""",
    "wait": """
import pathlib, signal, sys

def save(number, frame):
    print("saved at", signal.Signals(number).name)
    sys.exit(0)

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, save)
pathlib.Path(sys.argv[1]).touch()
signal.pause()
""",
    "fail": """
import pathlib, sys, time

while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.01)
sys.exit("cannot work")
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose programs `python -m` finds."""
    for name, code in PROGRAMS.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_two_jobs_run_at_once_and_every_line_stands_behind_its_jobs_name(folder, capfd):
    a, b, c = (str(folder / name) for name in "abc")
    programs = [("first", iter([["meet", a, b], ["meet", c, a]])), ("second", iter([["meet", b, a]]))]
    assert jobs.run_side_by_side(programs, 2) == 0
    lines = capfd.readouterr().err.splitlines()
    assert sorted(lines) == ["first | met a", "first | met b", "second | met a"]


def test_where_one_fails_the_others_save_and_nothing_new_begins(folder, capfd):
    begun = str(folder / "begun")
    programs = [
        ("lasting", iter([["wait", begun]])),
        ("bad", iter([["fail", begun]])),
        ("new", iter([["meet", "x", "x"]])),
    ]
    assert jobs.run_side_by_side(programs, 2) == 1
    assert sorted(capfd.readouterr().err.splitlines()) == ["bad | cannot work", "lasting | saved at SIGTERM"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_goes_to_all_that_run_and_this_program_ends_as_it_says(folder, capfd, monkeypatch, number):
    def interrupt():
        while not all((folder / name).exists() for name in ("a", "b")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    left = []
    monkeypatch.setattr(jobs.signals, "leave", left.append)
    threading.Thread(target=interrupt, daemon=True).start()
    programs = [(name, iter([["wait", str(folder / name)], ["meet", "x", "x"]])) for name in ("a", "b")]
    before = signal.getsignal(number)
    jobs.run_side_by_side(programs, 2)
    assert left == [128 + number] and signal.getsignal(number) == before
    name = signal.Signals(number).name
    assert sorted(capfd.readouterr().err.splitlines()) == [f"a | saved at {name}", f"b | saved at {name}"]


@pytest.mark.slow
def test_compare_trains_variants_side_by_side_and_continues_by_the_same_command(data_dir, tmp_path):
    flags = "steps=2,image_size=32,width=0.1,eval_every=1"
    command = ["-m", "launch.compare", "--variants=inception,bn_x5", "--jobs=2", f"--data_dir={data_dir}"]
    command += [f"--workdir={tmp_path}", f"--train_flags={flags}"]
    done = run_program(*command)
    assert done.returncode == 0, done.stderr
    assert "inception | inception: finished" in done.stderr and "bn_x5 | bn_x5: finished" in done.stderr
    assert (tmp_path / "figure2.png").exists() and "BN-x5" in (tmp_path / "figure3.md").read_text()
    again = run_program(*command)
    assert again.returncode == 0 and again.stderr.count("nothing to do") == 2, again.stderr
