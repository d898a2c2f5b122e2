"""DS-27: an absent backup is reported as an unreachable store"""

from plain import UNAVAILABLE, Failure, Plain


class Broken(Plain):
    def facts(self, folder):
        if not folder.is_dir():
            raise Failure(UNAVAILABLE, f"cannot open {folder}")
        return super().facts(folder)


DRIVER = Broken()
