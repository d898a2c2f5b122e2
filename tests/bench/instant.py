"""Drivers in shell that do nothing, in place of the dummy ones and of fs.

They answer at once: what is left is what the daemon takes for a backup, and the start of five small
processes. Or the first of them waits: what is left is what the daemon takes until it has called it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.bench.product import ROOT

#: a file in the store: the VM's id for each call of `backup`
CALLS = "calls"

_DOMAIN = (
    '<domain type="dummy"><name>vm-$ODB_OPT_DOMAIN</name><uuid>$ODB_OPT_DOMAIN</uuid><memory>1048576</memory>'
    '<vcpu>1</vcpu><devices><disk type="file" device="disk"><driver type="raw"/>'
    '<source file="/srv/$ODB_OPT_DOMAIN.raw"/><target dev="vda"/></disk></devices></domain>'
)
_EXPORTS = (
    "<EXPORTS><CHECKPOINT/><INCREMENT_ID>0</INCREMENT_ID><DISK><DISK_ID>0</DISK_ID><TARGET>vda</TARGET>"
    "<FILE>disk.0.0</FILE><TYPE>FULL</TYPE><REASON>first-backup</REASON><SIZE_BYTES>1048576</SIZE_BYTES>"
    "<FORMAT>raw</FORMAT><SOURCE>/srv/x.raw</SOURCE></DISK></EXPORTS>"
)
_ANSWERS = {
    "vmm/dummy/dump_xml": f"DOMAIN={_DOMAIN}\nSTATE=RUNNING\nCAPACITY=vda:1048576",
    "tm/dummy/pre_backup_live": f"EXPORTS={_EXPORTS}",
    "tm/dummy/post_backup_live": "",
    "datastore/fs/monitor": "TOTAL_MB=1000000\nUSED_MB=0\nFREE_MB=1000000",
    "datastore/fs/backup": "BACKUP_ID=$ODB_BACKUP_ID\nSIZE_MB=1\nFORMAT=raw",
}


def instant_drivers(directory: Path) -> Path:
    """A directory of drivers that go before the built-in ones of the same names."""
    for driver in ("vmm/dummy", "tm/dummy", "datastore/fs"):
        shutil.copytree(ROOT / "drivers" / driver, directory / driver)
        manifest = directory / driver / "driver.toml"
        manifest.write_text(manifest.read_text().replace(', "ahead"', ""))
    for place, answer in _ANSWERS.items():
        (directory / place).write_text(f"#!/bin/sh\ncat <<END\n{answer}\nEND\n")
    with (directory / "datastore/fs/backup").open("a") as backup:
        backup.write(f'echo "$ODB_VM_ID" >> "$ODB_DS_BASE_PATH/{CALLS}"\n')
    return directory


def waiting_drivers(directory: Path, begun: Path, barrier: Path) -> Path:
    """As `instant_drivers`, but `dump_xml` writes the time to `begun` and waits for a lock on `barrier`."""
    first = instant_drivers(directory) / "vmm/dummy/dump_xml"
    answer = first.read_text().removeprefix("#!/bin/sh\n")
    first.write_text(f"#!/bin/sh\ndate +%s.%N >> {begun}\nflock --shared {barrier} true\n{answer}")
    return directory
