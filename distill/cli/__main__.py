"""Entry point of `python -m coursepack.distill.cli`, for torchrun."""

from coursepack.distill.cli import main

if __name__ == "__main__":
    main()
