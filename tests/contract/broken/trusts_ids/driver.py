"""DS-26: ids become paths as they come"""

from plain import Plain


class Broken(Plain):
    def checked(self, name):
        return name


DRIVER = Broken()
