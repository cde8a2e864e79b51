"""The torture harness: every acting command killed, cut off, raced and deceived; `make torture`."""
