"""Many runs: comparisons and sweeps, on this machine or on a cluster."""
