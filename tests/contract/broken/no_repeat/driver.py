"""DS-20: a backup that is there already is an error"""

import os

from plain import Failure, Plain


class Broken(Plain):
    def backup(self):
        if self.folder(os.environ["ODB_BACKUP_ID"]).exists():
            raise Failure(1, "the backup exists already")
        super().backup()


DRIVER = Broken()
