"""Pseudo-URLs: one disk of one restore point, in a form a person can type.

    <scheme>://<datastore id>/<job id or ->/<increment>:<source>[,…]/<vm id>/disk.<disk id>
    fs://100/-/0:20261121-023700-1f2e3d,1:20261121-030000-4c5b6a/7/disk.0

The list holds the backups that carry parts of that disk, oldest first: its last
full one and the increments after it. OpenNebula's own forms, with an absolute
path for the last two parts and nothing for `-`, are accepted too:

    rsync://100//0:a78156,1:c1a00b/var/lib/one/datastores/100/13/c1a00b/disk.0.1
    restic://100/12/0:25f4b298,1:6968545c/var/lib/one/datastores/0/53/backup/disk.0

Of such a path only the VM and the disk count: OpenNebula's drivers name the file of
increment 0 in it even where the list goes further, so the list says what is meant. In those of restic's the
job names the repository; as our ids do (see `sdk.opennebula`), 0:25f4b298 becomes 0:job_12.25f4b298. A
URL is parsed into typed ids and built again from them; no part of it is ever
joined to a path as it came. `<scheme>+rbd` are differences of RBD images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from oned_backup.errors import InvalidInput, Unsupported
from oned_backup.model.names import checked_name

_MAX_CHARACTERS = 65536
#: of a restic_snapshot, as OpenNebula writes it
_SHORT_ID = re.compile(r"[0-9a-f]{8}")

_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9]{0,31})(?P<rbd>\+rbd)?://(?P<datastore>\d{1,9})/(?P<job>-|\d{0,9})/"
    r"(?P<chain>\d{1,9}:[^/,:]{1,64}(?:,\d{1,9}:[^/,:]{1,64})*)"
    r"(?P<directory>(?:/+[^/]+)*?)/+(?P<vm>\d{1,9})(?:/+(?P<folder>[^/]+))?/+"
    r"disk\.(?P<disk>\d{1,9})(?:\.(?P<increment>\d{1,9}))?(?P<rbd_file>\.rbd2|\.rbdiff)?",
    re.ASCII,
)


@dataclass(frozen=True)
class DiskUrl:
    """The typed parts of a pseudo-URL; `chain` is (increment id, backup id), oldest first."""

    scheme: str
    datastore_id: int
    chain: tuple[tuple[int, str], ...]
    vm_id: int
    disk_id: int
    job_id: int | None = None

    def __str__(self) -> str:
        """The canonical form."""
        chain = ",".join(f"{increment}:{source}" for increment, source in self.chain)
        job = "-" if self.job_id is None else self.job_id
        return f"{self.scheme}://{self.datastore_id}/{job}/{chain}/{self.vm_id}/disk.{self.disk_id}"

    @property
    def backup_id(self) -> str:
        """The restore point that is meant: the newest of the list."""
        return self.chain[-1][1]


def parse_url(url: str) -> DiskUrl:
    """The parts of a pseudo-URL; `InvalidInput` says what the form is, `Unsupported` for RBD."""
    match = _URL.fullmatch(url) if len(url) <= _MAX_CHARACTERS else None
    if not match:
        raise InvalidInput(
            f"'{url[:120]}' is not a pseudo-URL of a backed-up disk",
            hint="The form is SCHEME://DATASTORE/-/INCREMENT:BACKUP[,…]/VM/disk.N; `image ls` prints them.",
        )
    if match["rbd"] or match["rbd_file"]:
        raise Unsupported(
            f"{match['scheme']}+rbd: backups of RBD images are not supported yet",
            hint="OpenNebula itself can still restore them.",
        )
    chain = []
    for entry in match["chain"].split(","):
        increment, _, source = entry.partition(":")
        if match["scheme"] == "restic" and match["job"].isdigit() and _SHORT_ID.fullmatch(source):
            source = f"job_{int(match['job'])}.{source}"
        chain.append((int(increment), checked_name(source, "backup id in the URL")))
    increments = [increment for increment, _ in chain]
    if increments != sorted(set(increments)):
        raise InvalidInput("the increments of the URL are not in ascending order")
    return DiskUrl(
        scheme=match["scheme"],
        datastore_id=int(match["datastore"]),
        chain=tuple(chain),
        vm_id=int(match["vm"]),
        disk_id=int(match["disk"]),
        job_id=int(match["job"]) if match["job"].isdigit() else None,
    )
