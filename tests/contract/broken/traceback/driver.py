"""ALL-03: what is not there leads to an uncaught exception"""

import json

from plain import Plain


class Missing(Exception):
    pass


class Broken(Plain):
    def facts(self, folder):
        try:
            return json.loads((folder / "facts").read_text())
        except OSError as error:
            raise Missing from error


DRIVER = Broken()
