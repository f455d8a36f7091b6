"""`python -m coursepack.distill.cli`, as torchrun starts it."""

from coursepack.distill.cli import main

if __name__ == "__main__":
    main()
