"""`precompute`, whose second rank is killed before its sixth rename, once; torchrun starts it."""

import os

from moments import at_rename, die

from coursepack.precompute.cli import main

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_rename(6, die)
main()
