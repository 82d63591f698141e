"""Results of runs: the record, tables and pictures."""
