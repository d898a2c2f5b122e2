"""DS-08: a full disk is stored with all its zeros"""

import subprocess

from plain import Plain


class Broken(Plain):
    def copy(self, source, target):
        super().copy(source, target)
        if source.name.startswith("disk."):
            argv = ["qemu-img", "convert", "-S", "0", "-O", "qcow2", str(source), str(target)]
            subprocess.run(argv, check=True)


DRIVER = Broken()
