"""What the transfer managers of all hypervisors do alike: put restored disks where they belong, as files."""

from __future__ import annotations

from oned_backup.sdk import Answer, Call, Driver


class FilesDriver(Driver):
    """Restores to new files in a directory of the host. A backup loads nothing of it."""

    def pre_restore(self, call: Call) -> Answer:
        """Where to write the disks that are restored."""
        from oned_backup.contract.targets import targets_to_xml  # noqa: PLC0415
        from oned_backup.transfer import restoring  # noqa: PLC0415

        return {"TARGETS": targets_to_xml(restoring.pre_restore(call.request, call.source_dir))}

    def restore(self, call: Call) -> None:
        """What was restored has its names."""
        from oned_backup.transfer import restoring  # noqa: PLC0415

        restoring.restore(call.request)

    def post_restore(self, call: Call) -> None:
        """Nothing is left of it but a restore that succeeded."""
        from oned_backup.transfer import restoring  # noqa: PLC0415

        restoring.post_restore(call.request)
