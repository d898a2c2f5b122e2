"""DS-46: what a merge wrote before the store was full stays"""

import secrets

from plain import Plain


class Broken(Plain):
    def clean_up(self, partial):
        partial.rename(partial.with_name(f".failed-{secrets.token_hex(4)}"))


DRIVER = Broken()
