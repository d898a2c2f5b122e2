"""DS-01: backup does not print SIZE_MB"""

from plain import Plain


class Broken(Plain):
    def answer(self, final):
        print(f"BACKUP_ID={final.name}\nFORMAT=raw")


DRIVER = Broken()
