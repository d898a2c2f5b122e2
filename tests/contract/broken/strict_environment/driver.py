"""ALL-05: an unknown variable is taken for a mistake"""

import os

from plain import Failure, Plain

KNOWN = ("ODB_OPT_", "ODB_DS_", "ODB_OP", "ODB_S", "ODB_T", "ODB_D", "ODB_VM_ID", "ODB_CHAIN", "ODB_IM")


class Broken(Plain):
    def open_store(self, *, create=False):
        super().open_store(create=create)
        for name in os.environ:
            if name.startswith("ODB_") and not name.startswith(
                (*KNOWN, "ODB_BACKUP_ID", "ODB_PARENT", "ODB_INC")
            ):
                raise Failure(78, f"unknown variable {name}")


DRIVER = Broken()
