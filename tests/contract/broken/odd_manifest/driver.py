"""ALL-01: driver.toml claims a feature that does not exist"""

from plain import Plain

DRIVER = Plain()
