"""`python -m compress` is the console script `compress`."""

from compress.cli import main

main()
