"""Files on a server that may allow nothing but SFTP: OpenSSH's `sftp`, in batches.

Paths are given to it within double quotes, where it takes glob characters as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from oned_backup.errors import DriverFailed, InvalidInput, NotFound, OnedBackupError
from oned_backup.sdk import ssh
from oned_backup.sdk.process import Completed, run
from oned_backup.ssh.command import FAILED

_TIMEOUT_S = 60.0
_SPECIAL = re.compile(r'([\\"])')
_ABSENT = re.compile(r"No such file or directory|not found", re.IGNORECASE)


def batch(target: str, commands: Sequence[str]) -> Completed:
    """What `sftp` printed; it stops at the first command that fails (one that begins with `-` may).

    `NotFound` if that was for something that is not there; errors of the connection as `sdk.ssh` has them.
    """
    argv = ["sftp", "-F", str(ssh.config_path()), "-b", "-", "--", target]
    done = run(argv, stdin="\n".join([*commands, ""]).encode(), timeout_s=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise _failure(target, done)
    return done


def path_argument(path: PurePosixPath | str) -> str:
    """The path as a word of a command."""
    text = str(path)
    if any(ord(character) < 32 for character in text):
        raise InvalidInput(f"'{text[:80]!r}' cannot be a path on an SFTP server")
    return '"' + _SPECIAL.sub(r"\\\1", text) + '"'


def names(target: str, path: PurePosixPath) -> list[str]:
    """What is in a directory."""
    done = batch(target, [f"ls -1a {path_argument(path)}"])
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    found = (line.rpartition("/")[2] for line in lines if not line.startswith("sftp>"))
    return sorted(name for name in found if name not in {"", ".", ".."})


def matches(target: str, path: PurePosixPath, pattern: str) -> list[PurePosixPath]:
    """The files below a directory whose paths there fit a glob pattern; none, too, if it is absent."""
    done = batch(target, [f"-ls -1 {path_argument(path)}/{pattern}"])
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    return [PurePosixPath(line) for line in lines if line.startswith(f"{path}/")]


def space_kb(target: str, path: PurePosixPath) -> tuple[int, int, int]:
    """Total, used and available KiB of the file system that holds `path`."""
    done = batch(target, [f"cd {path_argument(path)}", "df ."])  # `df` alone does not say that it is absent
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        words = line.split()
        if len(words) >= 4 and all(word.isdecimal() for word in words[:3]):
            return int(words[0]), int(words[1]), int(words[2])
    raise DriverFailed(f"sftp to {target}: the server tells no free space of {path}")


def _failure(target: str, done: Completed) -> OnedBackupError:
    text = done.stderr.decode("utf-8", "replace")
    if done.returncode == FAILED:
        return ssh.failed(target, done.stderr)
    last = done.last_words or "no message"
    return (
        NotFound(f"{target}: {last}") if _ABSENT.search(text) else DriverFailed(f"sftp to {target}: {last}")
    )
