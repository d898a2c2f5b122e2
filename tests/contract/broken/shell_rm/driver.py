"""DS-26: ids are pasted into a shell command"""

import os
import subprocess

from plain import Plain


class Broken(Plain):
    def backup_cancel(self):
        self.open_store()
        partial = f"{self.base}/{os.environ['ODB_VM_ID']}/.new-{os.environ['ODB_BACKUP_ID']}"
        subprocess.run(["sh", "-c", f"cd {self.base}/..; rm -rf {partial}"], check=False)


DRIVER = Broken()
