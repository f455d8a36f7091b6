"""Entry point of `python -m coursepack.distill.cli`, for torchrun."""

from coursepack.distill.cli import main

main()
