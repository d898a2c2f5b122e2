"""DS-40: only the newest of several files goes into the merged one"""

from plain import Plain


class Broken(Plain):
    def merge_disk(self, beneath, inside, target):
        super().merge_disk(beneath, inside[-1:], target)


DRIVER = Broken()
