"""What a kernel is, one kernel a file, and what tunes them."""
