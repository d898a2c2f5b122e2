"""The documents that datastore actions answer with: LISTING, PLAN, REPORT, CATALOGUE.

<LISTING> <DISK> DISK_ID URL SIZE_BYTES FILE BLAKE3 </DISK>* </LISTING>        ls
<PLAN>                                                                        restore
  <BACKUP_ID/> <INCREMENT_ID/>
  <DISK> DISK_ID URL SIZE_BYTES FILE BLAKE3 </DISK>*
  <FILE> NAME CONTENT(base64) </FILE>*       vm.xml, domain.xml, nvram.fd, tpm.tar
</PLAN>
<REPORT> <BACKUP> ID READ_BYTES <FAILURE> FILE TEXT </FAILURE>* </BACKUP>* </REPORT>  verify
<CATALOGUE> <MANIFEST>manifest.json's text</MANIFEST>* <UNREADABLE> ID TEXT </UNREADABLE>* </CATALOGUE>
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from oned_backup import xmldoc
from oned_backup.errors import DriverBug


@dataclass(frozen=True)
class StoredDisk:
    """A disk as it can be restored. `size_bytes`: of the guest's disk; `blake3`: of the newest file."""

    disk_id: int
    url: str
    size_bytes: int
    file: str
    blake3: str = ""

    def to_xml(self) -> xmldoc.Element:
        """A DISK element."""
        return xmldoc.build(
            "DISK",
            {
                "DISK_ID": self.disk_id,
                "URL": self.url,
                "SIZE_BYTES": self.size_bytes,
                "FILE": self.file,
                "BLAKE3": self.blake3,
            },
        )

    @classmethod
    def from_xml(cls, element: xmldoc.Element) -> StoredDisk:
        """The typed form of a DISK element."""
        return cls(
            disk_id=xmldoc.integer(element, "DISK_ID"),
            url=xmldoc.text(element, "URL"),
            size_bytes=xmldoc.integer(element, "SIZE_BYTES"),
            file=xmldoc.text(element, "FILE"),
            blake3=xmldoc.text(element, "BLAKE3"),
        )


@dataclass(frozen=True)
class Listing:
    """The disks of a restore point."""

    disks: tuple[StoredDisk, ...]

    def to_xml(self) -> xmldoc.Element:
        """The LISTING element."""
        return xmldoc.build("LISTING", [disk.to_xml() for disk in self.disks])

    @classmethod
    def from_xml(cls, element: xmldoc.Element) -> Listing:
        """The typed form."""
        return cls(tuple(StoredDisk.from_xml(disk) for disk in element.findall("DISK")))


@dataclass(frozen=True)
class RestorePlan:
    """What it takes to restore a VM, or one of its disks, at an increment."""

    backup_id: str
    increment_id: int
    disks: tuple[StoredDisk, ...]
    #: the small files by name, checked against their checksums by the driver
    files: tuple[tuple[str, bytes], ...]

    def file(self, name: str) -> bytes | None:
        """The content of a small file, None where the backup has none of that name."""
        return dict(self.files).get(name)

    def to_xml(self) -> xmldoc.Element:
        """The PLAN element."""
        return xmldoc.build(
            "PLAN",
            {
                "BACKUP_ID": self.backup_id,
                "INCREMENT_ID": self.increment_id,
                "DISK": [disk.to_xml() for disk in self.disks],
                "FILE": [
                    xmldoc.build("FILE", {"NAME": name, "CONTENT": base64.b64encode(data).decode()})
                    for name, data in self.files
                ],
            },
        )

    @classmethod
    def from_xml(cls, element: xmldoc.Element) -> RestorePlan:
        """The typed form; `DriverBug` where it breaks the contract."""
        try:
            files = tuple(
                (xmldoc.text(file, "NAME"), base64.b64decode(xmldoc.text(file, "CONTENT"), validate=True))
                for file in element.findall("FILE")
            )
        except ValueError as error:
            raise DriverBug(f"PLAN/FILE: {error}") from error
        return cls(
            backup_id=xmldoc.text(element, "BACKUP_ID"),
            increment_id=xmldoc.integer(element, "INCREMENT_ID"),
            disks=tuple(StoredDisk.from_xml(disk) for disk in element.findall("DISK")),
            files=files,
        )


@dataclass(frozen=True)
class VerifiedBackup:
    """What `verify` found out about one backup; no `failures`: it is good as far as was read."""

    backup_id: str
    read_bytes: int
    #: (file name, what is wrong with it)
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def failure_texts(self) -> tuple[str, ...]:
        """Each failure in words, which name its file once: drivers may begin with it, or with its path."""
        return tuple(
            text
            if text.startswith(f"{name}: ") or text.partition(" ")[0].endswith(f"/{name}")
            else f"{name}: {text}"
            for name, text in self.failures
        )

    @property
    def failures_text(self) -> str:
        """The failures on one line."""
        return "; ".join(self.failure_texts)


@dataclass(frozen=True)
class VerifyReport:
    """All backups that were looked at."""

    backups: tuple[VerifiedBackup, ...]

    def to_xml(self) -> xmldoc.Element:
        """The REPORT element."""
        return xmldoc.build(
            "REPORT",
            [
                xmldoc.build(
                    "BACKUP",
                    {
                        "ID": backup.backup_id,
                        "READ_BYTES": backup.read_bytes,
                        "FAILURE": [
                            xmldoc.build("FAILURE", {"FILE": name, "TEXT": text})
                            for name, text in backup.failures
                        ],
                    },
                )
                for backup in self.backups
            ],
        )

    @classmethod
    def from_xml(cls, element: xmldoc.Element) -> VerifyReport:
        """The typed form."""
        return cls(
            tuple(
                VerifiedBackup(
                    backup_id=xmldoc.text(backup, "ID"),
                    read_bytes=xmldoc.integer(backup, "READ_BYTES", 0),
                    failures=tuple(
                        (xmldoc.text(failure, "FILE"), xmldoc.text(failure, "TEXT"))
                        for failure in backup.findall("FAILURE")
                    ),
                )
                for backup in element.findall("BACKUP")
            )
        )


@dataclass(frozen=True)
class Catalogue:
    """All finished backups of a store: manifests as stored, and what could not be read."""

    manifests: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...] = ()

    def to_xml(self) -> xmldoc.Element:
        """The CATALOGUE element."""
        return xmldoc.build(
            "CATALOGUE",
            {
                "MANIFEST": [xmldoc.build("MANIFEST", text) for text in self.manifests],
                "UNREADABLE": [
                    xmldoc.build("UNREADABLE", {"ID": name, "TEXT": text}) for name, text in self.unreadable
                ],
            },
        )

    @classmethod
    def from_xml(cls, element: xmldoc.Element) -> Catalogue:
        """The typed form."""
        return cls(
            manifests=tuple(manifest.text or "" for manifest in element.findall("MANIFEST")),
            unreadable=tuple(
                (xmldoc.text(entry, "ID"), xmldoc.text(entry, "TEXT"))
                for entry in element.findall("UNREADABLE")
            ),
        )
