"""`precompute`, whose second rank begins two seconds later than the first; torchrun starts it."""

import os
import time

from coursepack.models import TeacherRunner
from coursepack.precompute.cli import main

if os.environ["RANK"] == "1":
    run = TeacherRunner.run

    def slow(self, pixels):
        TeacherRunner.run = run
        time.sleep(2)
        return run(self, pixels)

    TeacherRunner.run = slow
main()
