"""DS-12: monitor counts in kilobytes"""

from plain import Plain


class Broken(Plain):
    def capacity(self, total, free):
        super().capacity(total << 10, free << 10)


DRIVER = Broken()
