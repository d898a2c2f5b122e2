"""ALL-03: a failure ends without a word"""

import sys

from plain import Plain


class Broken(Plain):
    def fail(self, code, text):
        del text
        sys.exit(code)


DRIVER = Broken()
