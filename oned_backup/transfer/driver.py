"""The transfer manager drivers for images (qcow2 with change tracking, raw without) behind a libvirt.

qcow2, shared and ssh differ in where the images of a VM lie, and in whether another host finds
the same ones; what is done with them is the same, and stands here.
"""

from __future__ import annotations

from oned_backup.contract.exports import Exports
from oned_backup.sdk import Answer, Call
from oned_backup.transfer.clean import clean_up, undo
from oned_backup.transfer.files_driver import FilesDriver
from oned_backup.transfer.task import task_of


class ImageDriver(FilesDriver):
    """Exports disks through libvirt's backup jobs, or qemu-nbd while the domain is off."""

    def warm_up(self, action: str) -> None:
        """Load what the action will load; libvirt's library takes half of it."""
        import libvirt  # noqa: F401, PLC0415

        if action == "pre_backup_live":
            import oned_backup.transfer.live  # noqa: F401, PLC0415

    def pre_backup_live(self, call: Call) -> Answer:
        """The frozen disks of a running domain."""
        from oned_backup.transfer.live import export_live  # noqa: PLC0415 - opens disks as well

        return _answer(call, export_live(task_of(call.request), call.source_dir))

    def pre_backup(self, call: Call) -> Answer:
        """The disks of a domain that is off."""
        from oned_backup.transfer.off import export_off  # noqa: PLC0415

        return _answer(call, export_off(task_of(call.request), call.source_dir))

    def post_backup(self, call: Call) -> None:
        """Nothing is left but the checkpoint to keep, whatever state the domain is in."""
        aborted = clean_up(task_of(call.request))
        if aborted:
            call.warn(f"the backup job was aborted: {aborted}")

    post_backup_live = post_backup


def _answer(call: Call, exports: Exports) -> Answer:
    if exports.freeze.warning:
        call.warn(exports.freeze.warning)
    for disk in exports.disks:
        if disk.text:
            call.warn(f"{disk.target}: {disk.type.lower()}, {disk.reason}: {disk.text}")
    if call.transfer == "staged":
        from oned_backup.transfer.staging import staged  # noqa: PLC0415 - loads the data engine

        try:
            exports = staged(exports, call.source_dir, call.progress)
        except BaseException:
            undo(task_of(call.request))
            raise
    return {"EXPORTS": exports.to_xml()}
