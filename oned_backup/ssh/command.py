"""The argument list of an OpenSSH command, and what its failures mean.

A remote command is text for the login shell over there. It is made from an
argument list in one place, here. Commands made by `watched` also end when we
do: sshd does not end a command whose client is gone, so a small shell beside it waits
for the end of its standard input, which comes whether we end, are killed or lose the
connection; and `timeout` ends it if not even that comes through.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from oned_backup.errors import InvalidInput, Misconfigured, OnedBackupError, PermissionDenied, Unavailable
from oned_backup.ssh.config_file import SHARED

#: the variable by which drivers learn of the client configuration
CONFIG_VARIABLE = "ODB_SSH_CONFIG"
#: OpenSSH's exit code for everything that goes wrong before the remote command runs
FAILED = 255

_TARGET = re.compile(r"(?:ssh://)?(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9:\[][A-Za-z0-9.:_\[\]%-]*")
#: what the remote side gets over the local limit, so that ours is the one that is met
_LATER_S = 10

# $1: bytes of standard input that are the program's. They are complete before it starts. All of this
# runs in the process group that `timeout` has made: `kill 0` has `timeout` end it, with KILL
# if TERM is not enough.
_WATCHED = """\
n=$1; shift; exec 3<&0 4</dev/null; trap : TERM
if [ "$n" -gt 0 ]; then
  f=$(mktemp) && exec 4<"$f" 5>"$f" && rm -f "$f" && head -c "$n" <&3 >&5 && exec 5>&- || exit 74
  [ "$(wc -c </proc/$$/fd/4)" -eq "$n" ] || exit 74
fi
"$@" <&4 3<&- 4<&- & c=$!
(while read -r _ <&3; do :; done; kill 0) >/dev/null 2>&1 & w=$!
wait "$c"; r=$?; while kill -0 "$c" 2>/dev/null; do wait "$c"; done; kill "$w" 2>/dev/null; exit "$r"
"""


def config_path() -> Path:
    """OpenSSH's client configuration for this driver; `Misconfigured` outside of one."""
    path = os.environ.get(CONFIG_VARIABLE, "")
    if not path.startswith("/"):
        raise Misconfigured(
            f"{CONFIG_VARIABLE} is not set", hint="The daemon sets it; by hand: <state dir>/ssh/config."
        )
    return Path(path)


def wrapper_path() -> Path:
    """The program that is `ssh` with our configuration, for those that take only a program's name."""
    return config_path().with_name("ssh")


def shared_config_path() -> Path:
    """The same for commands that are short, move little, and may share a connection."""
    config = config_path()
    shared = config.with_name(SHARED)
    return shared if shared.is_file() else config


def checked_target(target: str) -> str:
    """`user@host`, `host` (an alias of the configuration, too) or `ssh://user@host:port`; nothing else."""
    if not _TARGET.fullmatch(target):
        raise InvalidInput(f"ssh: '{target[:80]}' is not of the form user@host")
    return target


def ssh_argv(
    target: str,
    remote_argv: Sequence[str] = (),
    *,
    options: Sequence[str] = (),
    config: Path | None = None,
) -> list[str]:
    """The command line of `ssh` to `target`; `options` are ssh's own (`-N`, `-o`, …)."""
    argv = ["ssh", "-F", str(config or config_path()), "-T", *options, "--", checked_target(target)]
    if remote_argv:
        argv.append(quoted(remote_argv))
    return argv


def quoted(argv: Sequence[str]) -> str:
    """The one text that the remote shell takes apart into `argv` again."""
    for word in argv:
        if "\0" in word:
            raise InvalidInput(f"ssh: {word[:40]!r} cannot be an argument of a remote command")
    return shlex.join(argv)


def watched(argv: Sequence[str], *, timeout_s: float, stdin_bytes: int = 0) -> list[str]:
    """The remote command that runs `argv` and ends with us.

    Its standard input must stay open for as long as it is wanted: the first `stdin_bytes` are for
    the program, the end of the rest ends it.
    """
    longest = math.ceil(timeout_s) + _LATER_S
    bounded = ["env", "LC_ALL=C", "timeout", "-k", "5", str(longest)]
    return [*bounded, "sh", "-c", _WATCHED, "sh", str(stdin_bytes), *argv]


def failure(target: str, stderr: str) -> OnedBackupError:
    """What it means that ssh ended with code 255 and these last words.

    `Misconfigured` for host keys, `PermissionDenied` for a refused login, else `Unavailable`.
    """
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    words = lines[-1] if lines else "the connection ended"
    host = host_of(target)
    if "HOST IDENTIFICATION HAS CHANGED" in stderr:
        return changed_key(host, _fingerprint(stderr))
    if "Host key verification failed" in stderr or "host key is known for" in stderr:
        return unknown_key(host)
    if "Permission denied" in stderr or "Too many authentication failures" in stderr:
        return PermissionDenied(
            f"ssh to {target}: {words}",
            hint="Put the public key into its authorized_keys; `oned-backup config show` names the key.",
        )
    if "Bad configuration option" in stderr or "Bad owner or permissions" in stderr:
        return Misconfigured(f"ssh to {target}: {words}")
    return Unavailable(f"ssh to {target}: {words}")


def host_of(target: str) -> str:
    """The host in a target, for people."""
    return target.removeprefix("ssh://").rpartition("@")[2]


def unknown_key(host: str, fingerprint: str = "") -> Misconfigured:
    """Nobody has accepted a key of the host yet."""
    shown = fingerprint or "SHA256:…"
    seen = f"; it shows {fingerprint}" if fingerprint else ""
    return Misconfigured(
        f"ssh: the host key of {host} is not known{seen}",
        hint=f"Compare it with `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` on {host}, then repeat with"
        f" --accept-host-key {shown}",
    )


def changed_key(host: str, fingerprint: str = "") -> Misconfigured:
    """The host shows another key than the accepted one."""
    seen = f" to {fingerprint}" if fingerprint else ""
    return Misconfigured(
        f"ssh: the host key of {host} has changed{seen}: another machine may answer in its place",
        hint="If it was installed anew, accept the new key with --accept-host-key; see `operations.md`.",
    )


def _fingerprint(text: str) -> str:
    found = re.search(r"SHA256:[A-Za-z0-9+/]{43}", text)
    return found.group() if found else ""
