"""``python -m ktk``."""

from ktk.cli import main

main()
