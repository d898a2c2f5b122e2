"""DS-41: zeros of a merged increment no longer hide what lies beneath"""

from plain import Plain


class Broken(Plain):
    def merge_disk(self, beneath, inside, target):
        del beneath
        super().convert(inside, target)

    def convert(self, layers, target):
        super().convert(layers, target)


DRIVER = Broken()
