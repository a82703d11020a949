"""Pure tensor functions: gradients in x, supports, R-hat, and the small sampler behind ``sample()``."""
