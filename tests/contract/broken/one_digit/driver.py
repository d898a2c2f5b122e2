"""DS-07: only the first ten disks are stored"""

import os

from plain import Plain


class Broken(Plain):
    def store(self, partial):
        os.environ["ODB_DISKS"] = ",".join(os.environ["ODB_DISKS"].split(",")[:10])
        super().store(partial)


DRIVER = Broken()
