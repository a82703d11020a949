"""Divergences between samples: KALE, critics, kernel comparisons of generators, particle flows."""
