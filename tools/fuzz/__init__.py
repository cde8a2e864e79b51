"""Coverage-guided fuzzing of the readers of manifests and weights; `make fuzz` runs it.

`targets` has one function for each reader, which the tests also run on the seeds without a
fuzzer. `probe` reads hostile files in a process whose memory and time are watched.
"""
