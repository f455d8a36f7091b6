"""The fused loss on the CPU: numba kernels, the records they read and the threads they run in."""
