"""DS-04: FORMAT is ignored"""

import os

from plain import Plain


class Broken(Plain):
    def convert(self, layers, target, *how):
        os.environ["ODB_OPT_FORMAT"] = "raw"
        super().convert(layers, target, *how)


DRIVER = Broken()
