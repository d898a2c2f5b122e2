"""The conformance kit: judges a driver by the clauses of `share/doc/driver-spec.md`.

Drivers of datastores are given real disks, made by QEMU's tools, and judged by
what comes back; drivers of the other kinds, by how they answer without a
hypervisor. Nothing is asked about how a driver does its work.
"""

from oned_backup.runner.kit.check import check_driver
from oned_backup.runner.kit.clause import CLAUSES, Clause, ClauseResult, Report, Status

__all__ = ["CLAUSES", "Clause", "ClauseResult", "Report", "Status", "check_driver"]
