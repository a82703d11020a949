"""Other libraries, and what the benchmarks measure of them."""
