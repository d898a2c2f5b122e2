"""DS-33: verify tidies away what is damaged"""

from plain import Plain


class Broken(Plain):
    def failures(self, folder):
        found = super().failures(folder)
        for name, _ in found:
            (folder / name).unlink(missing_ok=True)
        return found


DRIVER = Broken()
