"""DS-36: the password is in the log"""

import sys

from plain import Plain


class Broken(Plain):
    def open_store(self, *, create=False):
        print(f"<7>opening the store with {self.password}", file=sys.stderr)
        super().open_store(create=create)


DRIVER = Broken()
