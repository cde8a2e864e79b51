"""Measurements: `make bench` and `make bench-download`."""
