"""Multi-teacher knowledge distillation from precomputed outputs of frozen teachers.

`coursepack.precompute` runs teachers and writes their outputs to stores; `coursepack.distill` trains students
from stores. Both use `coursepack.data` (sources, views, the store format), `coursepack.models` (networks by
name) and `coursepack.kernels` (fused loss kernels). The modules directly in this package are shared by all of
them: errors, configs, console output, canonical JSON, atomic file writes, locks, imports by name, devices.
"""

__version__ = "0.1.0"
