"""DS-49: what is being merged cannot be found meanwhile"""

from plain import Plain


class Broken(Plain):
    def merge(self, ids, partial):
        super().merge(ids, partial)
        for name in ids:
            self.folder(name).rename(self.folder(name).with_name(f".busy-{name}"))
        partial.with_name("busy").mkdir()
        for _ in range(3):
            self.write_sums(partial)
        partial.with_name("busy").rmdir()
        for name in ids:
            self.folder(name).with_name(f".busy-{name}").rename(self.folder(name))


DRIVER = Broken()
