"""Fault tolerance of runs: stop signals, the lock of a run's folder, and the note of a finished training."""
