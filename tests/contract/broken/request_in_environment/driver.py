"""ALL-04: the request is handed to a child in its environment, where 10 MB do not fit"""

import os
import subprocess
import sys

from plain import Plain


class Broken(Plain):
    def main(self):
        subprocess.run(["true"], env={**os.environ, "REQUEST": sys.stdin.read()}, check=True)
        super().main()


DRIVER = Broken()
