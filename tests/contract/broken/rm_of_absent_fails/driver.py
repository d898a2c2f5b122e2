"""DS-21: removing what is absent is an error"""

from plain import NOT_FOUND, Failure, Plain


class Broken(Plain):
    def remove(self, folder):
        if not folder.exists():
            raise Failure(NOT_FOUND, f"there is no backup {folder.name}")
        super().remove(folder)


DRIVER = Broken()
