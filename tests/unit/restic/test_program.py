"""What restic's ends mean, of versions with exit codes and without; locks of others, by the real program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oned_backup.errors import (
    Busy,
    DataCorrupt,
    DriverFailed,
    NoSpace,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from oned_backup.restic import program
from oned_backup.restic.program import Location, Repository, explain
from oned_backup.sdk.process import Completed

SFTP = Location("sftp:root@backup:/srv/7", target="root@backup")

#: as restic 0.14 prints it, with exit code 1
SAYINGS = {
    """Fatal: unable to open config file: Lstat: file does not exist
Is there a repository at the following location?
sftp:root@backup:/srv/7""": NotFound,
    "Fatal: unable to open config file: stat /srv/7/config: no such file or directory": NotFound,
    "Fatal: unable to open config file: Stat: The specified key does not exist.": NotFound,
    "Fatal: wrong password or no key found": PermissionDenied,
    "unable to create lock in backend: repository is already locked exclusively by PID 7 on backup": Busy,
    """subprocess ssh: ssh: connect to host backup port 22: Connection refused
Fatal: unable to open repository at sftp:root@backup:/srv/7: unable to start the sftp session, error: EOF
""": Unavailable,
    """Save(<data/329c93ba65>) returned error, retrying after 552ms: Write: connection lost
error while unlocking: ssh command exited: exit status 255Fatal: unable to save snapshot""": Unavailable,
    """Fatal: unable to open repository at s3:http://s3/b/7:
dial tcp 127.0.0.1:1: connect: connection refused""": Unavailable,
    "Fatal: unable to open config file: Stat: Access Denied.": PermissionDenied,
    "Save(<data/1>) returned error: write /srv/7/data: no space left on device": NoSpace,
    "Load(<index/8f>, 0, 0) returned error, retrying: ciphertext verification failed": DataCorrupt,
    "Fatal: something that nobody has seen yet": DriverFailed,
}


@pytest.mark.parametrize("text", SAYINGS, ids=lambda text: text.splitlines()[0][:40])
def test_messages_of_old_versions_are_recognised(text):
    error = explain(SFTP, Completed((), 1, b"", text.encode()))
    assert type(error) is SAYINGS[text]
    assert error.message


@pytest.mark.parametrize(("code", "kind"), [(10, NotFound), (11, Busy), (12, PermissionDenied)])
def test_exit_codes_of_new_versions_count_whatever_is_said(code, kind):
    assert type(explain(SFTP, Completed((), code, b"", b"in another language"))) is kind


def test_a_server_that_cannot_be_reached_is_never_an_absent_repository():
    text = b"subprocess ssh: ssh: Could not resolve hostname backup\nFatal: unable to open config file: EOF\n"
    assert type(explain(SFTP, Completed((), 1, b"", text))) is not NotFound


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A repository in a directory of this machine, and its password."""
    root = tmp_path_factory.mktemp("restic")
    (root / "password").write_text("secret")
    Repository(Location(str(root / "repository")), root / "password").must("init")
    return root


@pytest.fixture
def repository(made):
    return Repository(Location(str(made / "repository")), made / "password", flags=["--no-cache"])


def test_absent_and_wrongly_opened_repositories_are_told_apart(made, tmp_path):
    (tmp_path / "wrong").write_text("wrong")
    with pytest.raises(NotFound, match="there is no repository"):
        Repository(Location(str(tmp_path / "absent")), made / "password").must("snapshots")
    with pytest.raises(PermissionDenied, match="RESTIC_PASSWORD does not open"):
        Repository(Location(str(made / "repository")), tmp_path / "wrong").must("snapshots")


def locked(made: Path, repository: Repository) -> subprocess.Popen[bytes]:
    """A restic that holds an exclusive lock: stopped while it does so."""
    holder = subprocess.Popen(
        ["restic", "--repo", repository.location.url, "--password-file", made / "password", "--no-cache",
         "check", "--read-data"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    locks = made / "repository/locks"
    deadline = time.monotonic() + 60
    while not any(len(lock.name) == 64 for lock in locks.iterdir()):  # before that it has a temporary name
        assert holder.poll() is None
        assert time.monotonic() < deadline
    holder.send_signal(signal.SIGSTOP)
    return holder


@pytest.fixture
def with_data(repository, tmp_path):
    """Enough of it for `check` to take a moment."""
    (tmp_path / "noise").write_bytes(os.urandom(64 << 20))
    repository.must("backup", str(tmp_path / "noise"))


def test_a_live_lock_is_respected_and_a_dead_one_removed(made, repository, with_data, monkeypatch):
    monkeypatch.setattr(program, "_LOCK_WAIT_S", 0.1)
    monkeypatch.setattr(program, "_LOCK_PAUSE_S", 0.01)
    holder = locked(made, repository)
    try:
        with pytest.raises(Busy, match=f"locked exclusively by PID {holder.pid}"):
            repository.must("prune")
        assert list((made / "repository/locks").iterdir())
    finally:
        holder.kill()
        holder.wait()
    repository.must("prune")
    assert not list((made / "repository/locks").iterdir())


def test_neither_password_nor_keys_are_in_arguments_or_environment(made, tmp_path, monkeypatch):
    seen = tmp_path / "restic"
    seen.write_text(f"#!{sys.executable}\nimport os, sys\nprint(sys.argv, dict(os.environ))\n")
    seen.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("RESTIC_PASSWORD", "secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    location = Location(str(made / "repository"))
    said = Repository(location, made / "password").must("snapshots").stdout
    assert b"--password-file" in said
    assert b"secret" not in said.replace(str(made).encode(), b"")
