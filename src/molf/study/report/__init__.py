"""The page about finished runs: one HTML file that needs no network."""
