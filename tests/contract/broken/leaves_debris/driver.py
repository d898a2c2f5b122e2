"""DS-32: what did not fit stays, and is not found again"""

import secrets

from plain import Plain


class Broken(Plain):
    def clean_up(self, partial):
        partial.rename(partial.with_name(f".failed-{secrets.token_hex(4)}"))


DRIVER = Broken()
