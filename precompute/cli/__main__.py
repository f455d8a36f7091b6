"""Entry point of `python -m coursepack.precompute.cli`, for torchrun."""

from coursepack.precompute.cli import main

if __name__ == "__main__":
    main()
