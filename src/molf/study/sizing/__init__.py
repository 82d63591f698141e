"""Parameters and memory of a run, before it starts."""
