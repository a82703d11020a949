"""Running kernels: drivers, sequential Monte Carlo, replay buffers, the short way."""
