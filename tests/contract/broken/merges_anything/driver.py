"""DS-47: whatever it is told is merged"""

from plain import Plain, option


class Broken(Plain):
    def ids_to_merge(self):
        return option("MERGE_IDS").split(",")


DRIVER = Broken()
