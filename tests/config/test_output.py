"""What leaves the process is printable, whoever writes it; progress bars still move."""

from __future__ import annotations

import contextlib
import io
import logging
import sys

from tqdm import tqdm

from indistill.config.output import printable_output

NAME = "a\x1b[2J\x07\u202e\udcff"
SHOWN = r"a\x1b[2J\x07\u202e\udcff"


@contextlib.contextmanager
def printed():
    """Yield standard output and error as two buffers, whose text must be UTF-8."""
    buffers = io.BytesIO(), io.BytesIO()
    out, err = (
        io.TextIOWrapper(buffer, encoding="utf-8", newline="", write_through=True) for buffer in buffers
    )
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), printable_output():
        yield buffers
        assert sys.stdout.encoding == "utf-8"  # other attributes are those of the stream
        assert sys.stderr.buffer is buffers[1]
        assert not sys.stderr.isatty()
    for stream in (out, err):
        stream.detach()  # else it would close the buffer


def test_prints_and_log_lines_are_printable():
    with printed() as (out, err):
        print(f"{NAME}\tis\r", "two\nlines")
        sys.stdout.writelines([NAME, "\n"])
        print(f"error: {NAME}\rx", file=sys.stderr, flush=True)
        logger = logging.getLogger("test_output")
        logger.propagate = False  # so that only the last resort, which is standard error, writes
        logger.warning("%s", NAME)
    assert out.getvalue().decode() == f"{SHOWN}\tis\\r two\nlines\n{SHOWN}\n"
    assert err.getvalue().decode() == f"error: {SHOWN}\\rx\n{SHOWN}\n"


def test_a_bar_moves_and_colours_are_dropped():
    with printed() as (out, err):
        for _ in tqdm(range(2), desc=NAME, position=1, file=sys.stderr, mininterval=0):
            print("\x1b[1;31mred\x1b[0m")
    bar = err.getvalue().decode()
    assert {"\r", "\n"} < set(bar)
    assert SHOWN in bar
    assert "\x1b[A" in bar
    assert "\x1b" not in bar.replace("\x1b[A", "")
    assert out.getvalue().decode() == "red\nred\n"
