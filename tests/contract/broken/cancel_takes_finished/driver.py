"""DS-23: backup_cancel removes finished backups too"""

import os

from plain import Plain


class Broken(Plain):
    def backup_cancel(self):
        super().backup_cancel()
        self.remove(self.folder(os.environ["ODB_BACKUP_ID"]))


DRIVER = Broken()
