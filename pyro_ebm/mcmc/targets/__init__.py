"""What kernels sample: potentials on real coordinates, for many chains at once."""
