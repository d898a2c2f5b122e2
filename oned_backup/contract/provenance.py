"""What a backup's manifest says besides checksums: where it comes from and what it continues."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.exports import DiskExport, Exports
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import InvalidInput
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import StoredFile
from oned_backup.model.names import CHECKPOINT_PREFIX

_OWN_CHECKPOINT = re.compile(re.escape(CHECKPOINT_PREFIX) + r"([0-9a-f]{8})-")


def manifest_of(request: Request, exports: Exports, files: Sequence[StoredFile]) -> dict[str, Any]:
    """The `backup` object of manifest.json.

    If all disks came out FULL the backup starts a chain of its own, whatever
    the daemon had planned: increment 0, and no parent.
    """
    backup = request.backup
    if backup is None or request.vm is None:
        raise InvalidInput("request: a backup needs the sections BACKUP and VM")
    continues = exports.type is BackupType.INCREMENT
    if continues and not backup.parent_id:
        raise InvalidInput(f"backup {backup.id}: an increment needs BACKUP/PARENT_ID")
    return {
        "id": backup.id,
        "chain_id": backup.chain_id if continues else backup.id,
        "parent_id": backup.parent_id if continues else "",
        "increment_id": exports.increment_id if continues else 0,
        "type": exports.type.value,
        "date": backup.date,
        "installation": _installation(request, exports),
        "checkpoint": exports.checkpoint,
        "vm": _identity(request.vm),
        "freeze": asdict(exports.freeze),
        "disks": [_disk(disk, backup) for disk in exports.disks],
        "excluded": [
            {
                "disk_id": disk.disk_id,
                "target": disk.target,
                "reason": disk.reason.value,
                "text": disk.text,
            }
            for disk in exports.excluded
        ],
        "files": [file.to_json() for file in files],
    }


def _disk(disk: DiskExport, backup: Backup) -> dict[str, Any]:
    return {
        "disk_id": disk.disk_id,
        "target": disk.target,
        "type": disk.type.value,
        "reason": disk.reason.value,
        "text": disk.text,
        "file": disk.file,
        "parent_id": backup.parent_id if disk.type is BackupType.INCREMENT else "",
        "size_bytes": disk.size_bytes,
        "format": disk.format,
        "source": disk.source,
        "source_id": disk.source_id,
        "sample": disk.sample,
        "backing": list(disk.backing),
    }


def _identity(vm: xmldoc.Element) -> dict[str, Any]:
    return {
        "id": xmldoc.integer(vm, "ID"),
        "name": xmldoc.text(vm, "NAME"),
        "uuid": xmldoc.text(vm, "TEMPLATE/OS/UUID"),
    }


def _installation(request: Request, exports: Exports) -> str:
    found = _OWN_CHECKPOINT.match(exports.checkpoint)
    return request.options.get("INSTALLATION", "") or (found[1] if found else "")
