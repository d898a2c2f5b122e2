"""ALL-02: the mandatory action stat is not there"""

from plain import Plain

DRIVER = Plain()
