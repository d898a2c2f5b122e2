"""DS-13: ls writes down when it was asked"""

import time

from plain import Plain


class Broken(Plain):
    def ls(self):
        super().ls()
        with (self.base / "asked.log").open("a") as log:
            log.write(f"{time.time()}\n")


DRIVER = Broken()
