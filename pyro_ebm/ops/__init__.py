"""Pure tensor functions: gradients in x, supports, R-hat, the small sampler behind ``sample()``."""
