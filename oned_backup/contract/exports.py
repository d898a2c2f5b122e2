"""The EXPORTS document: what `pre_backup` hands to the datastore driver.

    <EXPORTS>
      <CHECKPOINT>odb-1f…-20261121-…</CHECKPOINT>          empty: none was made
      <INCREMENT_ID>3</INCREMENT_ID>
      <FREEZE><REQUESTED>AGENT</REQUESTED><METHOD>AGENT</METHOD><WINDOW_MS>41</WINDOW_MS><WARNING/></FREEZE>
      <DISK>
        <DISK_ID>0</DISK_ID> <TARGET>vda</TARGET> <FILE>disk.0.3</FILE>
        <TYPE>INCREMENT</TYPE> <REASON>increment</REASON> <TEXT/>
        <SIZE_BYTES>8589934592</SIZE_BYTES>                 virtual size
        <SOURCE>/srv/vm/a.qcow2</SOURCE> <SOURCE_ID>2049:131073</SOURCE_ID> <FORMAT>qcow2</FORMAT>
        <SAMPLE>0:1f2e3d4c5b6a7988,…</SAMPLE>              some clusters: offset and digest
        <BACKING>/srv/vm/base.qcow2</BACKING>*              the rest of its backing chain
        <NBD_SOCKET>/run/…/nbd.sock</NBD_SOCKET> <NBD_EXPORT>vda</NBD_EXPORT>
        <DIRTY_BITMAP>backup-vda</DIRTY_BITMAP>             only for an increment
        <PATH>/…/disk.0.3</PATH>                            only when staged, instead of NBD_*
      </DISK>
      <EXCLUDED> <DISK_ID>1</DISK_ID> <TARGET>sda</TARGET> <REASON>cdrom</REASON> <TEXT>…</TEXT> </EXCLUDED>
      <FILE>vm.xml</FILE> <FILE>domain.xml</FILE> <FILE>nvram.fd</FILE> <FILE>tpm.tar</FILE>
    </EXPORTS>

FILEs lie in ODB_SOURCE_DIR under their own name. The document of a finished
backup comes back to the transfer manager as PARENT of the next request, so it
can tell whether a disk is still the one whose changes it has tracked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model.increments import BackupType
from oned_backup.model.names import checked_name


class Reason(StrEnum):
    """Why a disk was backed up as it was, or not at all: the stable codes of every fall-back."""

    INCREMENT = "increment"  # what was asked
    FULL_MODE = "full-mode"  # MODE=FULL
    FIRST_BACKUP = "first-backup"  # no parent: new chain
    RESET = "reset"  # new chain on request
    OTHER_DATASTORE = "other-datastore"  # new chain in the store that was asked for
    CHAIN_LENGTH = "chain-length"  # new chain, since the last one is as long as CHAIN_LENGTH says
    CHAIN_ENDED = "chain-ended"  # by a setting, a deletion, or since the catalogue was lost
    CHAIN_DAMAGED = "chain-damaged"  # a restore point of the chain failed verification
    CHAIN_LOST = "chain-lost"  # the chain's image is gone, not ready, or ends elsewhere than the VM says
    NEW_DISK = "new-disk"  # the parent does not have this disk
    DISK_REPLACED = "disk-replaced"  # another image than the parent's under this disk
    BITMAP_MISSING = "bitmap-missing"
    BITMAP_INCONSISTENT = "bitmap-inconsistent"  # QEMU did not close the image
    CHECKPOINT_INVALID = "checkpoint-invalid"  # libvirt refuses to use it
    CHANGED_UNSEEN = "changed-unseen"  # what the bitmap calls unchanged has changed
    NO_CHANGE_TRACKING = "no-change-tracking"  # raw images and the like: always full
    DISK_SHRUNK = "disk-shrunk"
    # of excluded disks
    CDROM = "cdrom"
    FLOPPY = "floppy"
    VOLATILE = "volatile"
    NOT_SELECTED = "not-selected"  # DISK_IDS
    READ_ONLY = "read-only"
    NO_MEDIUM = "no-medium"
    UNSUPPORTED_SOURCE = "unsupported-source"  # host device, network disk, filesystem …

    @property
    def is_fallback(self) -> bool:
        """Whether a disk was taken in full although an increment was due."""
        return self in _FALLBACKS


_FALLBACKS = frozenset(
    {
        Reason.CHAIN_ENDED,
        Reason.CHAIN_DAMAGED,
        Reason.CHAIN_LOST,
        Reason.NEW_DISK,
        Reason.DISK_REPLACED,
        Reason.DISK_SHRUNK,
        Reason.BITMAP_MISSING,
        Reason.BITMAP_INCONSISTENT,
        Reason.CHECKPOINT_INVALID,
        Reason.CHANGED_UNSEEN,
        Reason.NO_CHANGE_TRACKING,
    }
)


@dataclass(frozen=True)
class DiskExport:
    """One disk's frozen view, and how it came to be FULL or INCREMENT."""

    disk_id: int
    target: str
    file: str
    type: BackupType
    reason: Reason
    size_bytes: int
    format: str
    source: str
    source_id: str = ""
    #: see `disk.sample`
    sample: str = ""
    backing: tuple[str, ...] = ()
    text: str = ""
    nbd_socket: str = ""
    nbd_export: str = ""
    dirty_bitmap: str = ""
    path: str = ""


@dataclass(frozen=True)
class ExcludedDisk:
    """A disk that is not in the backup, and why."""

    target: str
    reason: Reason
    disk_id: int = -1
    text: str = ""


@dataclass(frozen=True)
class Freeze:
    """How the guest was made consistent. `window_ms`: how long it could not write."""

    requested: str = "NONE"
    method: str = "NONE"
    window_ms: int = 0
    warning: str = ""


@dataclass(frozen=True)
class Exports:
    """All that `pre_backup` made; see the module's text for the document."""

    disks: tuple[DiskExport, ...]
    increment_id: int = 0
    checkpoint: str = ""
    freeze: Freeze = field(default_factory=Freeze)
    excluded: tuple[ExcludedDisk, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def type(self) -> BackupType:
        """INCREMENT if any disk continues the chain; a backup of only full disks starts a new one."""
        if any(disk.type is BackupType.INCREMENT for disk in self.disks):
            return BackupType.INCREMENT
        return BackupType.FULL

    def to_xml(self) -> xmldoc.Element:
        """The EXPORTS element."""
        freeze = self.freeze
        return xmldoc.build(
            "EXPORTS",
            {
                "CHECKPOINT": self.checkpoint,
                "INCREMENT_ID": self.increment_id,
                "FREEZE": {
                    "REQUESTED": freeze.requested,
                    "METHOD": freeze.method,
                    "WINDOW_MS": freeze.window_ms,
                    "WARNING": freeze.warning,
                },
                "DISK": [_disk_to_xml(disk) for disk in self.disks],
                "EXCLUDED": [
                    xmldoc.build(
                        "EXCLUDED",
                        {
                            "DISK_ID": disk.disk_id,
                            "TARGET": disk.target,
                            "REASON": disk.reason.value,
                            "TEXT": disk.text,
                        },
                    )
                    for disk in self.excluded
                ],
                "FILE": [xmldoc.build("FILE", name) for name in self.files],
            },
        )

    @classmethod
    def from_xml(cls, element: xmldoc.Element) -> Exports:
        """The typed form; `InvalidInput` names the field that is absent or wrong."""
        return cls(
            disks=tuple(_disk_from_xml(disk) for disk in element.findall("DISK")),
            increment_id=xmldoc.integer(element, "INCREMENT_ID", 0),
            checkpoint=xmldoc.text(element, "CHECKPOINT"),
            freeze=Freeze(
                requested=xmldoc.text(element, "FREEZE/REQUESTED", "NONE"),
                method=xmldoc.text(element, "FREEZE/METHOD", "NONE"),
                window_ms=xmldoc.integer(element, "FREEZE/WINDOW_MS", 0),
                warning=xmldoc.text(element, "FREEZE/WARNING"),
            ),
            excluded=tuple(
                ExcludedDisk(
                    disk_id=xmldoc.integer(disk, "DISK_ID", -1),
                    target=xmldoc.text(disk, "TARGET"),
                    reason=_reason(disk),
                    text=xmldoc.text(disk, "TEXT"),
                )
                for disk in element.findall("EXCLUDED")
            ),
            files=tuple(checked_name(name.text or "", "EXPORTS/FILE") for name in element.findall("FILE")),
        )


def disk_file_name(disk_id: int, increment_id: int) -> str:
    """OpenNebula's name of a disk's file in a backup: 0 is the full backup that starts the chain."""
    return f"disk.{disk_id}.{increment_id}"


def _disk_to_xml(disk: DiskExport) -> xmldoc.Element:
    content: dict[str, xmldoc.Content] = {
        "DISK_ID": disk.disk_id,
        "TARGET": disk.target,
        "FILE": disk.file,
        "TYPE": disk.type.value,
        "REASON": disk.reason.value,
        "TEXT": disk.text,
        "SIZE_BYTES": disk.size_bytes,
        "SOURCE": disk.source,
        "SOURCE_ID": disk.source_id,
        "FORMAT": disk.format,
        "SAMPLE": disk.sample,
        "BACKING": [xmldoc.build("BACKING", path) for path in disk.backing],
    }
    if disk.path:
        content["PATH"] = disk.path
    elif disk.nbd_socket:
        content["NBD_SOCKET"] = disk.nbd_socket
        content["NBD_EXPORT"] = disk.nbd_export
        content["DIRTY_BITMAP"] = disk.dirty_bitmap
    return xmldoc.build("DISK", content)


def _disk_from_xml(element: xmldoc.Element) -> DiskExport:
    try:
        backup_type = BackupType(xmldoc.text(element, "TYPE"))
    except ValueError as error:
        raise InvalidInput(f"EXPORTS/DISK/TYPE: {error}") from error
    return DiskExport(
        disk_id=xmldoc.integer(element, "DISK_ID"),
        target=xmldoc.text(element, "TARGET"),
        file=checked_name(xmldoc.text(element, "FILE"), "EXPORTS/DISK/FILE"),
        type=backup_type,
        reason=_reason(element),
        text=xmldoc.text(element, "TEXT"),
        size_bytes=xmldoc.integer(element, "SIZE_BYTES"),
        format=xmldoc.text(element, "FORMAT"),
        source=xmldoc.text(element, "SOURCE"),
        source_id=xmldoc.text(element, "SOURCE_ID"),
        sample=xmldoc.text(element, "SAMPLE"),
        backing=tuple(backing.text or "" for backing in element.findall("BACKING")),
        nbd_socket=xmldoc.text(element, "NBD_SOCKET"),
        nbd_export=xmldoc.text(element, "NBD_EXPORT"),
        dirty_bitmap=xmldoc.text(element, "DIRTY_BITMAP"),
        path=xmldoc.text(element, "PATH"),
    )


def _reason(element: xmldoc.Element) -> Reason:
    try:
        return Reason(xmldoc.text(element, "REASON"))
    except ValueError as error:
        raise InvalidInput(f"EXPORTS/{element.tag}/REASON: {error}") from error
