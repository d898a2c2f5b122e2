"""DS-22: rm of one backup removes all of its VM"""

from plain import Plain


class Broken(Plain):
    def remove(self, folder):
        super().remove(folder.parent)


DRIVER = Broken()
