"""DS-01: SIZE_MB is in bytes"""

from plain import Plain


class Broken(Plain):
    def answer(self, final):
        size = sum(path.stat().st_size for path in final.iterdir())
        print(f"BACKUP_ID={final.name}\nSIZE_MB={size}\nFORMAT=raw")


DRIVER = Broken()
