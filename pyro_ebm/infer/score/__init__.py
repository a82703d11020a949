"""Objectives made of an energy's derivatives in x: no log Z, no samples of the model."""
