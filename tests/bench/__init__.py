"""The benchmark: ours beside its peers, both sides in one run; `make bench`."""
