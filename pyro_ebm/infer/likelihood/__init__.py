"""Likelihood training by Markov chains: contrastive divergence, short-run and persistent."""
