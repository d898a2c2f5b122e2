"""DS-43: what was merged is marked as such"""

from plain import Plain


class Broken(Plain):
    def merge(self, ids, partial):
        super().merge(ids, partial)
        facts = self.folder(ids[0]) / "facts"
        facts.write_bytes(facts.read_bytes() + b"\n")


DRIVER = Broken()
