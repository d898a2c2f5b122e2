"""DS-16: one lock for the whole store, and no patience"""

import fcntl
import os

from plain import Failure, Plain


class Broken(Plain):
    def backup(self):
        fd = os.open(self.base, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Failure(75, "another backup is running") from error
        super().backup()


DRIVER = Broken()
