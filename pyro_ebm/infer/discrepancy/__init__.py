"""Energy discrepancies: data compared with perturbed data, continuous, discrete and mixed."""
