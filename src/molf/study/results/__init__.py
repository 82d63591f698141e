"""What a run leaves: the result, tables, pictures and exports. Reads results and logs only."""
