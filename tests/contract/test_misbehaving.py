"""The runner under drivers that do everything wrong: it always returns, in time and in little memory."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from lab import wait_for

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import (
    Cancelled,
    DataCorrupt,
    DriverBug,
    DriverFailed,
    NoSpace,
    NotFound,
    OnedBackupError,
    PermissionDenied,
    Salvaged,
    Unavailable,
    Unsupported,
)
from oned_backup.runner.drivers import Driver, load_driver
from oned_backup.runner.run import Cancellation, Invocation, Limits, run_action

LIMITS = Limits(deadline_s=60, inactivity_s=30, grace_s=0.5, drain_s=0.5, stdout_bytes=1 << 20)
MANIFEST = """spec = 1
kind = "datastore"
name = "odd"
summary = "misbehaves"
[parameters.BASE_PATH]
[parameters.COLOUR]
default = "green"
[parameters.PASSWORD]
secret = true
"""
GOOD = "TOTAL_MB=30\\nUSED_MB=10\\nFREE_MB=20\\n"


@dataclass
class Bench:
    """One driver whose `monitor` is the script at hand, and everything it told."""

    driver: Driver
    root: Path
    logged: list[tuple[int, str]] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    #: is called when it has told something
    heard: Callable[[], None] = lambda: None

    def run(self, *, limits: Limits = LIMITS, **settings: object) -> dict[str, str]:
        request = settings.pop("request", None) or Request(Kind.DATASTORE, "op-0123456789ab", "test")
        invocation = settings.pop("invocation", None) or Invocation(self.root)
        return run_action(
            self.driver,
            "monitor",
            request,
            invocation,
            limits=limits,
            log=self._log,
            progress=self._progress,
            **settings,
        )

    def _log(self, level: int, line: str) -> None:
        self.logged.append((level, line))
        self.heard()

    def _progress(self, done: int, total: int) -> None:
        self.progress.append((done, total))
        self.heard()


class Clock:
    """The runner's clock, which a test puts forward: how fast the machine is decides nothing."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    def be_ahead(self, seconds: float) -> None:
        self.ahead_s = seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("oned_backup.runner.process.time", found)
    return found


@pytest.fixture
def bench(tmp_path: Path) -> Callable[[str], Bench]:
    def make(script: str) -> Bench:
        folder = tmp_path / "odd"
        folder.mkdir()
        (folder / "driver.toml").write_text(MANIFEST)
        is_shell = script.startswith("#!")
        (folder / "monitor").write_text(
            script if is_shell else f"#!{sys.executable}\nimport os, sys, time\n{script}"
        )
        (folder / "monitor").chmod(0o755)
        work = tmp_path / "work"
        work.mkdir(mode=0o700)
        return Bench(load_driver(folder), work)

    return make


def shell(script: str) -> str:
    return f"#!/bin/sh\n{script}\n"


def took(action: Callable[[], object]) -> float:
    start = time.monotonic()
    action()
    return time.monotonic() - start


def reset_peak_kib() -> int:
    """Forget the highest memory use so far (proc(5), clear_refs) and return the present one."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_kib()


def peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_result_and_surroundings(
    bench: Callable[[str], Bench], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(
        shell(
            'test "$(pwd)" != / && test "$(stat -c %a .)" = 700 || exit 1\n'
            'test "$(stat -c %a "$ODB_SECRETS_DIR")" = 700 || exit 2\n'
            'test "$(stat -c %a "$ODB_SECRETS_DIR/PASSWORD")" = 600 || exit 3\n'
            'test "$(cat "$ODB_SECRETS_DIR/PASSWORD")" = "pass word" || exit 4\n'
            f"env > {tmp_path}/environment; pwd > {tmp_path}/cwd; cat > {tmp_path}/stdin\n"
            "ps -o pgid= -p $$ | tr -d ' ' >&2; echo $$ >&2\n"
            f"printf '{GOOD}UNKNOWN=1\\nnonsense\\n'"
        )
    )
    monkeypatch.setenv("ODD_LEAK", "must not be seen")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    request = Request(
        Kind.DATASTORE,
        "op-0123456789ab",
        "backup",
        backup=Backup("20261121-023700-1f2e3d", "20261121-023700-1f2e3d", 0, 0),
        vm=xmldoc.build("VM", {"ID": 7}),
        image=xmldoc.build("IMAGE", {"SOURCE": "20261121-010000-aaaaaa", "BACKUP_INCREMENTS": None}),
        options={"URL": "fs://x y", "LONG": "x" * 100_000},
        datastore=xmldoc.build(
            "DATASTORE", {"ID": 103, "TEMPLATE": {"BASE_PATH": "/srv/a b", "PASSWORD": "no"}}
        ),
    )
    invocation = Invocation(
        b.root, source_dir=tmp_path, secrets={"PASSWORD": "pass word"}, environment={"ODB_EXTRA": "1"}
    )
    result = b.run(request=request, invocation=invocation)
    assert result == {"TOTAL_MB": "30", "USED_MB": "10", "FREE_MB": "20"}
    environment = dict(
        line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines()
    )
    deadline = int(environment.pop("ODB_DEADLINE"))
    assert 0 < deadline - time.time() <= 61
    assert environment.pop("ODB_SECRETS_DIR").startswith(str(b.root))
    assert environment.pop("PATH").startswith(str(Path(sys.executable).parent) + ":")
    environment.pop("HOME")
    assert {k: v for k, v in environment.items() if k not in {"PWD", "OLDPWD", "_", "SHLVL"}} == {
        "LC_ALL": "C.UTF-8",
        "XDG_RUNTIME_DIR": "/run/user/1000",
        "ODB_SPEC": "1",
        "ODB_OPERATION_ID": "op-0123456789ab",
        "ODB_BACKUP_ID": "20261121-023700-1f2e3d",
        "ODB_CHAIN_ID": "20261121-023700-1f2e3d",
        "ODB_INCREMENT_ID": "0",
        "ODB_PARENT_ID": "",
        "ODB_CHAIN": "0:20261121-010000-aaaaaa",
        "ODB_OPT_URL": "fs://x y",
        "ODB_VM_ID": "7",
        "ODB_DS_ID": "103",
        "ODB_DS_BASE_PATH": "/srv/a b",
        "ODB_IMAGES": "0",
        "ODB_DS_COLOUR": "green",
        "ODB_SOURCE_DIR": str(tmp_path),
        "ODB_TRANSFER": "stream",
        "ODB_EXTRA": "1",
    }
    sent = xmldoc.parse((tmp_path / "stdin").read_text())
    assert sent.tag == "DS_DRIVER_ACTION_DATA"
    assert xmldoc.text(sent, "DATASTORE/TEMPLATE/BASE_PATH") == "/srv/a b"
    assert b.logged[0][1] == b.logged[1][1], "the driver leads a process group of its own"
    assert list(b.root.iterdir()) == [], "the private directory is removed"


@pytest.mark.parametrize(
    ("code", "error"),
    [(64, Unsupported), (65, DataCorrupt), (66, NotFound), (69, Unavailable), (70, DriverBug), (73, NoSpace),
     (77, PermissionDenied), (1, DriverFailed), (255, DriverFailed), (42, DriverFailed), (3, DriverFailed)],
)  # fmt: skip
@pytest.mark.fault("driver", "unknown exit code")
@pytest.mark.fault("driver", "success printed, then exit 1")
def test_exit_codes(bench: Callable[[str], Bench], code: int, error: type[OnedBackupError]) -> None:
    b = bench(
        shell(f"printf '{GOOD}'; echo '<7>first' >&2; echo '<3>12 GB needed' >&2; echo >&2; exit {code}")
    )
    with pytest.raises(error) as caught:
        b.run()
    assert type(caught.value) is error
    assert str(caught.value) == "12 GB needed"
    assert b.logged == [(7, "first"), (3, "12 GB needed")]


def test_salvaged_carries_the_answer(bench: Callable[[str], Bench]) -> None:
    b = bench(shell(f"printf '{GOOD}'; echo 64 KB could not be proved >&2; exit 79"))
    with pytest.raises(Salvaged, match="could not be proved") as caught:
        b.run()
    assert caught.value.answer["FREE_MB"] == "20"


def test_failure_without_a_word_names_driver_action_and_code(bench: Callable[[str], Bench]) -> None:
    with pytest.raises(DriverFailed, match=r"^datastore/odd monitor: exit code 9 without a message$"):
        bench(shell("exit 9")).run()


@pytest.mark.fault("driver", "no output with exit 0")
def test_no_output_with_exit_0(bench: Callable[[str], Bench]) -> None:
    with pytest.raises(DriverBug, match=r"output lacks TOTAL_MB, USED_MB, FREE_MB: all went well$"):
        bench(shell("echo all went well >&2")).run()


@pytest.mark.fault("driver", "killed by a signal")
def test_killed_by_a_signal(bench: Callable[[str], Bench]) -> None:
    with pytest.raises(DriverFailed, match=r"killed by SIGSEGV: so far so good"):
        bench(shell(f"printf '{GOOD}'; echo so far so good >&2; kill -SEGV $$")).run()


@pytest.mark.fault("driver", "hangs")
def test_hanging_driver_is_ended_at_its_deadline(bench: Callable[[str], Bench], clock: Clock) -> None:
    b = bench("print('hanging', file=sys.stderr, flush=True)\ntime.sleep(1000)")
    b.heard = lambda: clock.be_ahead(60)
    with pytest.raises(DriverFailed, match=r"not finished after 60 s: hanging"):
        b.run(limits=replace(LIMITS, inactivity_s=None))


@pytest.mark.fault("driver", "silent beyond its limit")
def test_silent_driver_is_ended_and_the_answer_is_unknown(bench: Callable[[str], Bench]) -> None:
    with pytest.raises(Unavailable, match=r"no sign of life for 0.3 s"):
        bench("time.sleep(1000)").run(limits=replace(LIMITS, inactivity_s=0.3))


@pytest.mark.fault("driver", "silent beyond its limit")
def test_progress_is_a_sign_of_life(bench: Callable[[str], Bench], clock: Clock, tmp_path: Path) -> None:
    b = bench(
        "for i in range(3):\n    print('PROGRESS', i, 3, file=sys.stderr, flush=True)\n"
        f"    while not os.path.exists(f'{tmp_path}/{{i}}'): time.sleep(0.005)\n"
        f"print('{GOOD}')"
    )

    def heard() -> None:
        clock.be_ahead(20 * len(b.progress))
        (tmp_path / str(b.progress[-1][0])).touch()

    b.heard = heard
    assert b.run(limits=replace(LIMITS, deadline_s=None, inactivity_s=30))["FREE_MB"] == "20"
    assert b.progress == [(i, 3) for i in range(3)]
    assert b.logged == []


def test_term_is_given_grace(bench: Callable[[str], Bench], clock: Clock, tmp_path: Path) -> None:
    clean = f"trap 'echo cleaned > {tmp_path}/cleaned; exit 0' TERM"
    b = bench(shell(f"{clean}; echo ready >&2; while :; do sleep 0.05; done"))
    b.heard = lambda: clock.be_ahead(60)
    with pytest.raises(DriverFailed, match="not finished"):
        b.run(limits=replace(LIMITS, grace_s=20))
    assert (tmp_path / "cleaned").exists()


@pytest.mark.fault("driver", "ignores TERM")
def test_driver_that_ignores_term_is_killed(bench: Callable[[str], Bench], clock: Clock) -> None:
    b = bench(
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('deaf', file=sys.stderr, flush=True)\nwhile True: time.sleep(1)"
    )
    b.heard = lambda: clock.be_ahead(60)
    with pytest.raises(DriverFailed, match="not finished"):
        b.run()


@pytest.mark.parametrize("leave_group", [False, True])
@pytest.mark.fault("driver", "forks a child that keeps the pipes open")
def test_child_that_keeps_the_pipes(bench: Callable[[str], Bench], tmp_path: Path, leave_group: bool) -> None:
    b = bench(shell(background(tmp_path, "sleep 1000", leave_group=leave_group)))
    assert took(b.run) < 60  # and not for ever
    child = int((tmp_path / "pid").read_text())
    if leave_group:
        assert is_alive(child), "who leaves the group on purpose (qemu-nbd --fork) stays"
        os.kill(child, signal.SIGKILL)
    else:
        wait_for("the child's death with its group", lambda: not is_alive(child))


def background(tmp_path: Path, command: str, *, leave_group: bool) -> str:
    """A script that leaves `command` behind, its process id in the file `pid`, and succeeds."""
    how = "setsid " if leave_group else ""
    return (
        f"{how}sh -c 'echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec {command}' &\n"
        f"while test ! -e {tmp_path}/pid; do sleep 0.01; done; printf '{GOOD}'"
    )


@pytest.mark.fault("driver", "forks a child that keeps the pipes open")
def test_endless_child_that_floods_after_the_exit(bench: Callable[[str], Bench], tmp_path: Path) -> None:
    b = bench(shell(background(tmp_path, "yes >&2", leave_group=True)))
    try:
        assert took(b.run) < 60  # and not for ever
    finally:
        with suppress(ProcessLookupError):  # nobody reads what it says any more
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@pytest.mark.fault("driver", "1 GB on stdout")
def test_1_gb_on_stdout(bench: Callable[[str], Bench]) -> None:
    b = bench("piece = b'x' * (1 << 20)\nfor _ in range(1024): os.write(1, piece)\n")
    before = reset_peak_kib()
    with pytest.raises(DriverBug, match="printed more than 1048576 bytes"):
        b.run()
    assert peak_kib() - before < 32 * 1024


@pytest.mark.parametrize("piece", ["b'x' * (1 << 20)", "b'\\n' * (1 << 20)", "b'line\\n' * (1 << 18)"])
@pytest.mark.fault("driver", "1 GB on stderr")
def test_1_gb_on_stderr(bench: Callable[[str], Bench], piece: str) -> None:
    b = bench(
        f"piece = {piece}\nfor _ in range(1024): os.write(2, piece)\n"
        f"os.write(2, b'\\nthe end')\nprint('{GOOD}')"
    )
    before = reset_peak_kib()
    assert b.run()["FREE_MB"] == "20"
    assert peak_kib() - before < 32 * 1024
    assert len(b.logged) <= 2001


def test_progress_is_seen_in_a_flood(bench: Callable[[str], Bench]) -> None:
    b = bench(
        "os.write(2, b'line\\n' * 100000 + b'PROGRESS 5 6\\n')\n"
        "os.write(2, b'why it failed\\n')\nsys.exit(73)"
    )
    with pytest.raises(NoSpace, match=r"^why it failed$"):
        b.run()
    assert b.progress == [(5, 6)]
    assert b.logged[-1][1].endswith("further lines were not kept")


@pytest.mark.fault("driver", "a 100 MB line")
def test_100_mb_line(bench: Callable[[str], Bench]) -> None:
    b = bench("for _ in range(100): os.write(2, b'y' * (1 << 20))\nsys.exit(1)")
    with pytest.raises(DriverFailed) as caught:
        b.run()
    assert len(str(caught.value)) < 5000
    assert str(caught.value).startswith("yyyy")


@pytest.mark.fault("driver", "NUL, non-UTF-8 and escapes in its output")
def test_nul_non_utf8_and_escapes(bench: Callable[[str], Bench]) -> None:
    b = bench(
        "os.write(1, b'\\0\\xff\\xfe=\\n\\0\\nTOTAL_MB=30\\nUSED_MB=1\\nFREE_MB=2\\xff\\n')\n"
        "os.write(2, b'a\\0b\\xffc\\x1b[2Jd\\te\\r\\n')"
    )
    assert b.run()["FREE_MB"] == "2\N{REPLACEMENT CHARACTER}"
    mark = "\N{REPLACEMENT CHARACTER}"
    assert b.logged == [(6, f"a{mark}b{mark}c{mark}[2Jd e")]


@pytest.mark.fault("driver", "does not read its request, or reads it slowly")
def test_100_mb_request_is_never_read(bench: Callable[[str], Bench]) -> None:
    b = bench(shell(f"printf '{GOOD}'; sleep 0.3"))
    assert took(lambda: b.run(request=big_request())) < 20


@pytest.mark.fault("driver", "does not read its request, or reads it slowly")
def test_100_mb_request_is_read_slowly_and_whole(bench: Callable[[str], Bench]) -> None:
    b = bench(
        f"n = 0\nwhile p := os.read(0, 1 << 20): n += len(p)\nprint(n, file=sys.stderr)\nprint('{GOOD}')"
    )
    b.run(request=big_request())
    assert int(b.logged[0][1]) > 100_000_000


@pytest.mark.fault("driver", "does not read its request, or reads it slowly")
def test_stdin_closed_early_and_stdout_closed_early(bench: Callable[[str], Bench]) -> None:
    b = bench(
        f"print('{GOOD}', flush=True)\nos.close(0)\nos.close(1)\n"
        "time.sleep(0.3)\nprint('late', file=sys.stderr)"
    )
    assert b.run(request=big_request())["TOTAL_MB"] == "30"
    assert b.logged == [(6, "late")]


def test_cancelled_from_another_thread(bench: Callable[[str], Bench]) -> None:
    cancellation = Cancellation()
    b = bench("print('up', file=sys.stderr, flush=True)\ntime.sleep(1000)")
    caught: list[BaseException] = []

    def body() -> None:
        try:
            b.run(cancellation=cancellation)
        except OnedBackupError as error:
            caught.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    wait_for("the driver", lambda: b.logged)
    cancellation.cancel()
    cancellation.cancel()
    thread.join(10)
    assert not thread.is_alive()
    assert isinstance(caught[0], Cancelled)
    with pytest.raises(Cancelled, match="before it began"):
        b.run(cancellation=cancellation)


def test_secrets_are_struck_out(bench: Callable[[str], Bench]) -> None:
    b = bench(
        "p = open(os.environ['ODB_SECRETS_DIR'] + '/PASSWORD').read()\n"
        "print('trying', p, file=sys.stderr)\n"
        "print('login with', p.split()[1], 'failed', file=sys.stderr)\nsys.exit(77)"
    )
    with pytest.raises(PermissionDenied) as caught:
        b.run(invocation=Invocation(b.root, secrets={"PASSWORD": "tr0ub4dor\nhunter22\n"}))
    assert str(caught.value) == "login with *** failed"
    assert "hunter22" not in str(b.logged)
    assert "tr0ub4dor" not in str(b.logged)


def test_lock_lives_as_long_as_the_driver(bench: Callable[[str], Bench], tmp_path: Path) -> None:
    lock = tmp_path / "op.lock"
    b = bench(
        shell(f": > {tmp_path}/up; while test ! -e {tmp_path}/go; do sleep 0.02; done; printf '{GOOD}'")
    )
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    thread = threading.Thread(target=lambda: b.run(invocation=Invocation(b.root, lock_fd=fd)))
    thread.start()
    wait_for("the driver", (tmp_path / "up").exists)
    os.close(fd)  # as if the daemon had died
    other = os.open(lock, os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (tmp_path / "go").touch()
        thread.join(20)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)


def test_stdout_goes_to_the_descriptor(bench: Callable[[str], Bench], tmp_path: Path) -> None:
    b = bench("for _ in range(8): os.write(1, b'\\0' * (1 << 20))\nprint('PROGRESS 8 8', file=sys.stderr)")
    with (tmp_path / "out").open("wb") as out:
        assert b.run(stdout_fd=out.fileno()) == {}
    assert (tmp_path / "out").stat().st_size == 8 << 20
    assert b.progress == [(8, 8)]


@pytest.mark.fault("driver", "interpreter absent")
def test_interpreter_that_is_absent(bench: Callable[[str], Bench]) -> None:
    with pytest.raises(DriverBug, match="cannot be started: No such file"):
        bench("#!/nonexistent/interpreter\n").run()


def test_log_that_raises_kills_the_driver(bench: Callable[[str], Bench]) -> None:
    b = bench("print(os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(1000)")
    pids: list[int] = []

    def log(_level: int, line: str) -> None:
        pids.append(int(line))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_action(
            b.driver,
            "monitor",
            Request(Kind.DATASTORE, "op-1", "test"),
            Invocation(b.root),
            limits=LIMITS,
            log=log,
        )
    assert not is_alive(pids[0])


@pytest.mark.fault("driver", "leaves file descriptors and processes")
def test_nothing_is_left_open(bench: Callable[[str], Bench]) -> None:
    b = bench(shell(f"printf '{GOOD}'"))
    b.run()
    before = open_files()
    for _ in range(5):
        b.run(cancellation=Cancellation())
    assert open_files() == before


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def big_request() -> Request:
    return Request(Kind.DATASTORE, "op-0123456789ab", "test", options={"JUNK": "x" * 100_000_000})
