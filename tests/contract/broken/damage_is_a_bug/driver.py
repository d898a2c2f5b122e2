"""DS-34: a damaged file is reported as some error, not as damage"""

from plain import CORRUPT, Plain


class Broken(Plain):
    def fail(self, code, text):
        super().fail(1 if code == CORRUPT else code, text)


DRIVER = Broken()
