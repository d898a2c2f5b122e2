"""DS-45: the merged backup has its finished name before it is finished"""

from plain import Plain


class Broken(Plain):
    def merge(self, ids, partial):
        final = partial.with_name(partial.name.removeprefix(".new-"))
        partial.rename(final)
        super().merge(ids, final)
        final.rename(partial)


DRIVER = Broken()
