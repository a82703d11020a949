"""The parts of ``examples/quickstart.py``."""
