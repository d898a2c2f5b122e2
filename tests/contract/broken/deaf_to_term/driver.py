"""DS-25: TERM only makes it wait"""

import signal
import time

from plain import Plain


class Broken(Plain):
    def backup(self):
        signal.signal(signal.SIGTERM, lambda *_: time.sleep(60))
        super().backup()


DRIVER = Broken()
