"""DS-24: what a killed backup left stands in the way of the next"""

import os

from plain import Failure, Plain


class Broken(Plain):
    def backup(self):
        if self.partial(os.environ["ODB_BACKUP_ID"]).exists():
            raise Failure(1, "a backup of that id is under way")
        super().backup()


DRIVER = Broken()
