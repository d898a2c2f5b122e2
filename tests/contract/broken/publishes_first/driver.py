"""DS-24: files are written straight into the finished folder"""

import json
import os

from plain import Plain


class Broken(Plain):
    def partial(self, backup_id):
        return self.folder(backup_id)

    def publish(self, partial, final):
        pass

    def store(self, partial):
        disks = [disk.split(":") for disk in os.environ["ODB_DISKS"].split(",")]
        facts = {"increment": os.environ["ODB_INCREMENT_ID"], "disks": disks}
        (partial / "facts").write_text(json.dumps(facts))
        (partial / "sums").write_text(f"{self.sum_of(partial / 'facts')} facts\n")
        super().store(partial)


DRIVER = Broken()
