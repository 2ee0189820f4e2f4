"""`python -m vsc_serve` is `vsc`."""

from vsc_serve.cli import main

main()
