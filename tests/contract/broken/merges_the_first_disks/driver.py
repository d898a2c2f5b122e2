"""DS-40: the merged backup has the disks that the oldest had"""

from plain import Plain


class Broken(Plain):
    def facts(self, folder):
        facts = super().facts(folder)
        if hasattr(self, "ids") and folder.name == self.ids[-1]:
            first = {disk[0] for disk in super().facts(self.folder(self.ids[0]))["disks"]}
            facts["disks"] = [disk for disk in facts["disks"] if disk[0] in first]
        return facts

    def merge(self, ids, partial):
        self.ids = ids
        super().merge(ids, partial)


DRIVER = Broken()
