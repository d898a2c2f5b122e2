"""DS-33: verify looks at names, not at contents"""

from plain import Plain


class Broken(Plain):
    def failures(self, folder):
        there = {path.name for path in folder.iterdir()}
        return [(name, "is missing") for name in self.sums(folder) if name not in there]


DRIVER = Broken()
