"""DS-42: a file that is alone is linked, and gone when the old backup is removed"""

from plain import Plain


class Broken(Plain):
    def merge_disk(self, beneath, inside, target):
        if len(inside) == 1:
            target.symlink_to(inside[0])
        else:
            super().merge_disk(beneath, inside, target)


DRIVER = Broken()
