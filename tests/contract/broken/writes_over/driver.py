"""DS-05: only data is written over an existing file, its zeros are left as they were"""

import shutil
from pathlib import Path

from plain import Plain


class Broken(Plain):
    def convert(self, layers, target, *how):
        fresh = Path("fresh")
        super().convert(layers, fresh, *how)
        if not target.exists():
            shutil.move(fresh, target)
            return
        with fresh.open("rb") as source, target.open("r+b") as out:
            while piece := source.read(4096):
                if any(piece):
                    out.write(piece)
                else:
                    out.seek(len(piece), 1)


DRIVER = Broken()
