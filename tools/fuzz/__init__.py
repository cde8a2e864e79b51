"""Fuzzing of the readers of untrusted bytes; `make fuzz` runs it."""
