"""DS-36: the password is an argument of a program"""

import subprocess

from plain import Plain


class Broken(Plain):
    def open_store(self, *, create=False):
        subprocess.run(["sh", "-c", "sleep 0.1", "login", self.password], check=True)
        super().open_store(create=create)


DRIVER = Broken()
