"""DS-41: zeros of a merged increment no longer hide what lies beneath"""

import os

from plain import Plain


class Broken(Plain):
    def merge_disk(self, beneath, inside, target):
        del beneath
        os.environ["ODB_OPT_FORMAT"] = "qcow2"
        self.convert(inside, target)


DRIVER = Broken()
