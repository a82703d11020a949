"""Noise-contrastive objectives: an energy, and often log Z, by telling data from noise."""
