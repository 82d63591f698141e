"""One run: load, train, save, evaluate, write the result."""
