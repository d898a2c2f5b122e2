"""DS-23: backup_cancel leaves what an unfinished backup wrote"""

from plain import Plain


class Broken(Plain):
    def backup_cancel(self):
        self.open_store()


DRIVER = Broken()
