"""DS-32: a full store is just some error"""

from plain import Failure, Plain


class Broken(Plain):
    def copy(self, source, target):
        try:
            super().copy(source, target)
        except OSError as error:
            raise Failure(1, f"cp: {error}") from error


DRIVER = Broken()
