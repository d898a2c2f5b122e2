"""DS-42: rm of what was merged takes the merged one along"""

import json

from plain import Plain


class Broken(Plain):
    def merge(self, ids, partial):
        super().merge(ids, partial)
        partial.with_name(".merges").write_text(json.dumps(dict.fromkeys(ids, partial.name[5:])))

    def meant(self):
        ids = super().meant()
        merges = self.folder("x").with_name(".merges")
        return [*ids, *{json.loads(merges.read_text()).get(i, i) for i in ids}] if merges.exists() else ids


DRIVER = Broken()
