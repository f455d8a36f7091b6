"""`python -m coursepack.distill.cli`, as torchrun starts it."""

from coursepack.distill.cli import main

main()
