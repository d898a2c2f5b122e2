"""The client configuration that the daemon keeps; see the package's text for the directory."""

from __future__ import annotations

import os
from pathlib import Path

from oned_backup.errors import Misconfigured

#: a configuration for commands, which share a connection (see `write_shared`)
SHARED = "shared"
#: so long it is kept for the next command
SHARED_FOR_S = 30

#: OpenSSH's for the name of a socket while it is made: 40 digits of a hash, a dot, 16 random characters
_SOCKET_NAME_BYTES = 57
_SOCKET_PATH_BYTES = 107

#: a dead link is noticed after the interval times this
KEEPALIVE_COUNT = 3

#: preferred: with the processor's AES they take two thirds of the time of the default, ChaCha20
_CIPHERS = "aes128-gcm@openssh.com,aes256-gcm@openssh.com"

_HEAD = "# Written by oned-backup at each start: what you want for a host belongs into ssh.include's file.\n"

_WRAPPER = """\
#!/bin/sh
# Written by oned-backup: ssh with the configuration beside this file.
exec ssh -F "${0%/*}/config" "$@"
"""


def config_text(
    directory: Path,
    *,
    identity_file: Path | None = None,
    include: Path | None = None,
    connect_timeout_s: int = 10,
    keepalive_s: int = 5,
) -> str:
    """What `directory`/config says. The first value of an option counts, so `include` wins."""
    options = {
        "UserKnownHostsFile": _quoted(directory / "known_hosts"),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": "yes",
        "UpdateHostKeys": "no",
        "HashKnownHosts": "no",
        "BatchMode": "yes",
        "ConnectTimeout": str(connect_timeout_s),
        "ServerAliveInterval": str(keepalive_s),
        "ServerAliveCountMax": str(KEEPALIVE_COUNT),
        "TCPKeepAlive": "yes",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "PermitLocalCommand": "no",
        "Ciphers": f"^{_CIPHERS}",
        "ControlMaster": "no",
        "ControlPath": "none",
        "LogLevel": "ERROR",
    }
    if identity_file is not None:
        options |= {
            "IdentityFile": _quoted(identity_file),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
        }
    lines = [f"Include {_quoted(include, percent='%')}\n"] if include is not None else []
    lines += ["Host *\n", *(f"    {name} {value}\n" for name, value in options.items())]
    return _HEAD + "".join(lines)


def write_config(directory: Path, text: str) -> Path:
    """Write `directory`/config and what lies beside it; accepted keys stay. Returns the path of config."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    known_hosts = directory / "known_hosts"
    os.close(os.open(known_hosts, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    replace_file(directory / "ssh", _WRAPPER, mode=0o700)
    replace_file(directory / "config", text, mode=0o600)
    return directory / "config"


def write_shared(directory: Path, sockets: Path) -> None:
    """Write `directory`/shared, by which commands to one account share a connection.

    It has no effect where `sockets`, a private directory, has too long a path for sockets.
    """
    if len(os.fsencode(sockets)) + 1 + _SOCKET_NAME_BYTES > _SOCKET_PATH_BYTES:
        (directory / SHARED).unlink(missing_ok=True)
        return
    lines = [
        "Host *",
        "    ControlMaster auto",
        f"    ControlPath {_quoted(sockets / 'NAME').replace('NAME', '%C')}",
        f"    ControlPersist {SHARED_FOR_S}",
        f"Include {_quoted(directory / 'config', percent='%')}",
    ]
    replace_file(directory / SHARED, _HEAD + "".join(f"{line}\n" for line in lines), mode=0o600)


def replace_file(path: Path, text: str, *, mode: int) -> None:
    """Give a file new content at one instant: whoever reads sees the old or the new."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    new.replace(path)


def _quoted(path: Path, *, percent: str = "%%") -> str:
    text = str(path)
    if any(character in text for character in '"\n\\'):
        raise Misconfigured(f"ssh: the path {text!r} cannot stand in its configuration")
    return f'"{text.replace("%", percent)}"'
