"""The document of benchmarks: ratios first, every program in it."""

from benchmarks.__main__ import PROGRAMS, document, ratios_first

TABLE = """Two ways

| | ms | ratio to Keras |
|---|---|---|
| ours | 7.40 | 0.28 |
"""


def test_ratios_come_before_absolute_values():
    assert ratios_first(TABLE).splitlines()[2:] == [
        "|  | ratio to Keras | ms |",
        "| --- | --- | --- |",
        "| ours | 0.28 | 7.40 |",
    ]


def test_every_program_has_a_section_and_one_that_was_not_run_says_so(tmp_path):
    (tmp_path / f"{PROGRAMS[0]}.md").write_text("a machine\n\nits table\n")
    text = document(tmp_path)
    assert all(f"`python benchmarks/{name}.py`" in text for name in PROGRAMS)
    assert "its table" in text and text.count("Not run.") == len(PROGRAMS) - 1
