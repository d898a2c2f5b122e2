"""DS-35: any password opens the store"""

from plain import Plain


class Broken(Plain):
    def check_password(self, is_right):
        pass


DRIVER = Broken()
