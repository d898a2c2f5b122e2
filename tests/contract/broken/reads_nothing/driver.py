"""DS-14: verify says that it has read nothing, so that nobody can pace it"""

from plain import Plain


class Broken(Plain):
    def read_bytes(self, _folder):
        return 0


DRIVER = Broken()
