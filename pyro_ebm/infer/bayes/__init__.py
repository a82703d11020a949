"""Posteriors over the parameters of unnormalized models, and how far to trust them."""
