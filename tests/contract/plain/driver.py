"""The driver as it should be."""

from plain import Plain

DRIVER = Plain()
