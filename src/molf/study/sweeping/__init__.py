"""Many runs: a list of cells, an engine that carries them out here or on a cluster, and what became of them."""
