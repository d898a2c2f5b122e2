"""Programs that a driver runs."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from oned_backup.errors import DriverFailed, Misconfigured, Unavailable
from oned_backup.sdk import run


def python(text, **settings):
    return run([sys.executable, "-c", text], **settings)


def test_output_and_exit_code():
    done = python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")


def test_a_failure_says_the_last_words():
    with pytest.raises(DriverFailed, match=r"^python[\d.]*: it broke \(exit code 3\)$"):
        python("import sys; print('x\\nit broke\\n', file=sys.stderr); sys.exit(3)")
    with pytest.raises(DriverFailed, match="killed by signal 9"):
        python("import os; os.kill(os.getpid(), 9)")


def test_a_program_that_there_is_not():
    with pytest.raises(Misconfigured, match="no-such-program is not installed"):
        run(["no-such-program", "--", "x"])


def test_input_is_given_whole_or_not_at_all():
    data = os.urandom(1 << 20)
    assert python("import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())", stdin=data).stdout == data
    assert python("pass", stdin=data).returncode == 0
    assert python("import sys; print(len(sys.stdin.read()))").stdout == b"0\n"


def test_a_program_that_does_not_end_is_ended():
    with pytest.raises(Unavailable, match=r"no end after 0\.5 s"):
        run(["sleep", "600"], timeout_s=0.5)


def test_a_flood_is_bounded():
    with pytest.raises(DriverFailed, match="more than 1000000 bytes"):
        run(["yes"], max_output_bytes=1_000_000)
    done = python("import sys; sys.stderr.write('e' * 5_000_000 + 'end')")
    assert done.stderr.endswith(b"eend")
    assert len(done.stderr) < 200_000


def test_a_child_that_keeps_the_pipes_is_not_waited_for():
    done = run(["sh", "-c", "sleep 600 & echo $!"])
    os.kill(int(done.stdout), signal.SIGKILL)


def test_arguments_are_not_a_shell():
    assert run(["printf", "%s", "$(id); `id` 'x' \"y\""]).stdout == b"$(id); `id` 'x' \"y\""
