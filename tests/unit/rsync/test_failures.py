"""What the exit codes and words of rsync, ssh and the server's programs become."""

from __future__ import annotations

import threading

import pytest

from oned_backup.errors import (
    Conflict,
    DriverFailed,
    Misconfigured,
    NoSpace,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
)
from oned_backup.rsync.arguments import Settings
from oned_backup.rsync.failures import EXIT_CODES, LOST_CONNECTION, explain_rsync
from oned_backup.rsync.server import Server
from oned_backup.sdk.process import Completed

SUMMARY = "rsync error: error in file IO (code 11) at receiver.c(380) [receiver=3.2.7]\n"


@pytest.mark.parametrize(
    ("code", "stderr", "kind"),
    [
        (1, "rsync: unknown option\n", Misconfigured),
        (2, "protocol version mismatch\n", Misconfigured),
        (10, "", Unavailable),
        (12, "rsync: connection unexpectedly closed (37 bytes received so far) [sender]\n", Unavailable),
        (30, "rsync error: timeout in data send/receive (code 30)\n", Unavailable),
        (11, f'rsync: write failed on "/b/disk.0.0": No space left on device (28)\n{SUMMARY}', NoSpace),
        (11, f"rsync: write failed: Disk quota exceeded (122)\n{SUMMARY}", NoSpace),
        (11, f'rsync: open "/b/x": Read-only file system (30)\n{SUMMARY}', PermissionDenied),
        (23, 'rsync: mkstemp "/b/x" failed: Permission denied (13)\n', PermissionDenied),
        (11, f'rsync: write failed on "/b/x": Input/output error (5)\n{SUMMARY}', Unavailable),
        (127, "sh: 1: rsync: not found\n", Misconfigured),
        (
            12,
            "bash: line 1: rsync: command not found\nrsync: connection unexpectedly closed\n",
            Misconfigured,
        ),
        (14, "", DriverFailed),
        (-9, "", DriverFailed),
        (255, "ssh: connect to host backup port 22: Connection refused\n", Unavailable),
        (255, "oneadmin@backup: Permission denied (publickey).\n", PermissionDenied),
        (
            255,
            "@@@ REMOTE HOST IDENTIFICATION HAS CHANGED! @@@\nHost key verification failed.\n",
            Misconfigured,
        ),
    ],
)
def test_rsync_ended(code: int, stderr: str, kind: type[OnedBackupError]) -> None:
    error = explain_rsync("oneadmin@backup", code, stderr)
    assert type(error) is kind
    assert "backup" in error.message


def test_the_message_is_the_line_that_tells() -> None:
    error = explain_rsync("u@b", 11, f'rsync: write failed on "/x": No space left on device (28)\n{SUMMARY}')
    assert error.message == (
        'rsync to u@b: rsync: write failed on "/x": No space left on device (28) (exit code 11)'
    )


def test_whatever_another_connection_may_help_is_unavailable() -> None:
    assert {EXIT_CODES.get(code, Unavailable) for code in LOST_CONNECTION} == {Unavailable}


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "kind", "text"),
    [
        (69, "odb begun\n", "/b is not there", Unavailable, "u@b: /b is not there"),
        (78, "odb begun\n", "not a store of a version", Misconfigured, "not a store"),
        (4, "odb begun\n", "7/x exists already", Conflict, "exists already"),
        (1, "odb begun\n", "cat: write error: No space left on device", NoSpace, "No space left"),
        (
            1,
            "odb begun\n",
            "mkdir: cannot create directory '7': Permission denied",
            PermissionDenied,
            "mkdir",
        ),
        (1, "odb begun\n", "sync: error syncing 'x': Input/output error", Unavailable, "sync"),
        (1, "odb begun\n", "mv: cannot move", DriverFailed, "exit code 1"),
        (
            1,
            "",
            "rrsync error: SSH_ORIGINAL_COMMAND does not run rsync",
            Misconfigured,
            "does not let us run",
        ),
        (0, "Welcome!\n", "", Misconfigured, "does not let us run a shell"),
    ],
)
def test_the_server_refused(
    code: int,
    stdout: str,
    stderr: str,
    kind: type[OnedBackupError],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = Completed(("sh",), code, stdout.encode(), stderr.encode())
    monkeypatch.setattr("oned_backup.rsync.server.remote_run", lambda *_, **__: done)
    with pytest.raises(OnedBackupError, match=text) as caught:
        Server(Settings("u", "b", "/b"), known="0").space()
    assert type(caught.value) is kind


def test_what_a_login_shell_prints_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    said = b"Welcome to backup!\nodb begun\nodb file 12 disk.0.0\nodb space 100 60 40\nBye\n"
    done = Completed(("sh",), 0, said, b"")
    monkeypatch.setattr("oned_backup.rsync.server.remote_run", lambda *_, **__: done)
    prepared = Server(Settings("u", "b", "/b"), known="0").prepare("7", "x")
    assert (prepared.finished, prepared.partial, prepared.space.free) == (False, {"disk.0.0": 12}, 40)


def test_a_server_that_works_for_long_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    beaten = threading.Event()

    def slow(*_: object, **__: object) -> Completed:
        assert beaten.wait(30), "nobody said that it is at work"
        return Completed(("sh",), 0, b"odb begun\nodb space 3 2 1\n", b"")

    monkeypatch.setattr("oned_backup.rsync.server.remote_run", slow)
    monkeypatch.setattr("oned_backup.rsync.server._BEAT_S", 0.01)
    assert Server(Settings("u", "b", "/b"), known="0", alive=beaten.set).space().free == 1
