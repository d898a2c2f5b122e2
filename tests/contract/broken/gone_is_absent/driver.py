"""DS-30: a store that is not there has no backups"""

from plain import NOT_FOUND, Failure, Plain


class Broken(Plain):
    def open_store(self, *, create=False):
        if not self.base.is_dir():
            raise Failure(NOT_FOUND, f"{self.base} does not exist")
        super().open_store(create=create)


DRIVER = Broken()
