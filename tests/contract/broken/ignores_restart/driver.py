"""DS-03: a disk that is FULL inside an increment still shows what lies beneath it"""

from plain import Plain


class Broken(Plain):
    def disk_chain(self, wanted):
        del wanted
        return ",".join(f"{number}:{backup_id}" for number, backup_id in self.chain())


DRIVER = Broken()
