"""`python -m oned_backup`: the command line."""

from oned_backup.cli.main import main

main()
