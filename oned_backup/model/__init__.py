"""Documents and their rules: pure, without I/O, clock or processes."""
