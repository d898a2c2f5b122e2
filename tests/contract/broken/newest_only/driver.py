"""DS-03: only the newest file of a chain is restored"""

from plain import Plain


class Broken(Plain):
    def convert(self, layers, target, *how):
        super().convert(layers[-1:], target, *how)


DRIVER = Broken()
