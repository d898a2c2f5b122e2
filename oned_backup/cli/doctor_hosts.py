"""What hypervisors on other machines need, looked at through SSH."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from oned_backup.cli.check import Check
from oned_backup.errors import Misconfigured, OnedBackupError
from oned_backup.ssh.command import ssh_argv
from oned_backup.ssh.host_keys import explained
from oned_backup.ssh.libvirt_uri import LibvirtUri, parse_uri

#: what a backup of a VM there runs there, and the Debian package that has it
_PROGRAMS = {
    "qemu-img": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "virsh": "libvirt-clients",
    "setsid": "util-linux",
    "prlimit": "util-linux",
    "timeout": "coreutils",
    "tar": "tar",
}
_MISSING = 'for program; do command -v "$program" >/dev/null || echo "$program"; done'
_TIMEOUT_S = 30


def check_hosts(config: Path, hosts: Iterable[dict[str, Any]]) -> Iterator[Check]:
    """A check of each host that is reached by SSH, as the daemon lists them; `config`: the daemon's own."""
    for host in hosts:
        try:
            place = parse_uri(host["uri"])
        except OnedBackupError as error:
            yield Check(f"host {host['name']}", "fail", error.message, error.hint or "")
            continue
        if place.is_remote:
            yield check_host(config, host["name"], place)


def check_host(config: Path, name: str, place: LibvirtUri) -> Check:
    """Whether a host lets us in, and has what its backups need."""
    label = f"host {name}"
    argv = ssh_argv(place.target, ["sh", "-c", _MISSING, "sh", *_PROGRAMS], config=config)
    try:
        done = subprocess.run(
            argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(label, "fail", str(error), "Look at the network, and at sshd on the host.")
    if done.returncode != 0:
        failed = explained(place.target, done.stderr, config)
        is_down = not isinstance(failed, Misconfigured)
        return Check(label, "warn" if is_down else "fail", failed.message, failed.hint or "")
    missing = [program for program in done.stdout.split() if program in _PROGRAMS]
    if not missing:
        return Check(label, "ok", f"{place.target} has what backups need")
    packages = " ".join(sorted({_PROGRAMS[program] for program in missing}))
    status = "warn" if missing == ["virsh"] else "fail"
    text = f"{place.target} has no {', '.join(missing)}"
    if missing == ["virsh"]:
        text += ": nobody helps a frozen guest if the link breaks"
    return Check(label, status, text, f"Run there: apt-get install {packages}")
