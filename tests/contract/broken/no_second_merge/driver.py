"""DS-44: a merged backup that is there already is an error"""

import os

from plain import Failure, Plain


class Broken(Plain):
    def ids_to_merge(self):
        if self.folder(os.environ["ODB_BACKUP_ID"]).exists():
            raise Failure(1, "it is there already")
        return super().ids_to_merge()


DRIVER = Broken()
