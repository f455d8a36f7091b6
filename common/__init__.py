"""coursepack: run frozen teachers once, train any number of students from what they said.

The rooms: `coursepack.precompute` writes stores, `coursepack.distill` trains from them; both stand on
`coursepack.data` (sources, views, the store format), `coursepack.models` (networks by name) and
`coursepack.kernels` (fused maths). This package itself holds only what every room needs: errors, the
console, canonical JSON and whole-file writes.
"""

__version__ = "0.1.0"
