"""DS-49: what is being merged cannot be found meanwhile"""

import time

from plain import Plain


class Broken(Plain):
    def merge(self, ids, partial):
        for name in ids:
            self.folder(name).rename(self.folder(name).with_name(f".busy-{name}"))
        time.sleep(1)
        for name in ids:
            self.folder(name).with_name(f".busy-{name}").rename(self.folder(name))
        super().merge(ids, partial)


DRIVER = Broken()
