"""DS-31: an unmounted file system is taken for an empty store"""

from plain import Plain


class Broken(Plain):
    def open_store(self, *, create=False):
        if self.base.is_dir() and not (self.base / ".plain").exists():
            super().open_store(create=create) if create else None
        else:
            super().open_store(create=create)


DRIVER = Broken()
