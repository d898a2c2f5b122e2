"""DS-18: zeros are not written to an export that has something there"""

from plain import Plain


class Broken(Plain):
    def convert(self, layers, target, *how):
        super().convert(layers, target, *how, *(["--target-is-zero"] if how else []))


DRIVER = Broken()
