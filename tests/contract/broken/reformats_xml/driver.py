"""DS-09: vm.xml is parsed and written again"""

from xml.etree import ElementTree as ET

from plain import Plain


class Broken(Plain):
    def copy(self, source, target):
        if source.name == "vm.xml":
            ET.parse(source).write(target)  # noqa: S314
        else:
            super().copy(source, target)


DRIVER = Broken()
