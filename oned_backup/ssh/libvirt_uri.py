"""What a libvirt URI says of where libvirt is: on this machine, or on one that is reached by SSH.

qemu:///system                            here
qemu:///system?socket=/run/x/libvirt-sock here
qemu+ssh://root@hv1/system                on hv1: commands and data go the same way
qemu+ssh://root@hv1:2222/system
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from oned_backup.errors import InvalidInput, Misconfigured
from oned_backup.ssh.command import checked_target

#: what would have libvirt reach the host in another way than commands and data do
_REFUSED = frozenset(
    {"command", "keyfile", "no_verify", "no_tty", "sshauth", "known_hosts", "known_hosts_verify"}
)


@dataclass(frozen=True)
class LibvirtUri:
    """A URI taken apart. `target`: where ssh goes to; empty: this machine."""

    text: str
    target: str
    #: the same libvirt for a client on its own machine
    local: str

    @property
    def is_remote(self) -> bool:
        """Whether libvirt is on another machine."""
        return bool(self.target)

    @property
    def machine(self) -> str:
        """The name of the other machine, without user and port; empty for this one."""
        return (urlsplit(self.text).hostname or "") if self.is_remote else ""

    def over(self, ssh: Path) -> str:
        """What to give to libvirt, so that it reaches the host by the program `ssh`."""
        if not self.is_remote:
            return self.text
        parts = urlsplit(self.text)
        query = "&".join(filter(None, [parts.query, f"command={quote(str(ssh))}"]))
        return urlunsplit(parts._replace(query=query))


def parse_uri(text: str) -> LibvirtUri:
    """The URI taken apart; `InvalidInput` or `Misconfigured` for one by which backups cannot be made."""
    try:
        parts = urlsplit(text)
        user, host, port = parts.username, parts.hostname, parts.port
    except ValueError as error:
        raise InvalidInput(f"libvirt URI '{text[:80]}': {error}") from error
    driver, _, transport = parts.scheme.partition("+")
    if not driver:
        raise InvalidInput(f"'{text[:80]}' is not a libvirt URI", hint="One is qemu+ssh://root@host/system.")
    if transport in {"", "unix"} and not host:
        return LibvirtUri(text, "", text)
    if transport != "ssh" or not host:
        raise Misconfigured(
            f"libvirt URI '{text[:80]}': a host is reached by ssh or is this machine",
            hint="Use qemu+ssh://root@host/system, or qemu:///system.",
        )
    query = parse_qsl(parts.query, keep_blank_values=True)
    refused = sorted({key for key, _ in query} & _REFUSED)
    if refused:
        raise Misconfigured(
            f"libvirt URI '{text[:80]}': {refused[0]} would be used by libvirt alone",
            hint="Put it into the file of the setting ssh.include, which all use.",
        )
    name = f"[{host}]" if ":" in host else host
    target = f"{user}@{host}" if user else host
    if port is not None:
        target = f"ssh://{user}@{name}:{port}" if user else f"ssh://{name}:{port}"
    kept = urlencode([(key, value) for key, value in query if key not in {"netcat", "proxy"}], safe="/")
    local = f"{driver}://{parts.path}?{kept}" if kept else f"{driver}://{parts.path}"
    return LibvirtUri(text, checked_target(target), local)
