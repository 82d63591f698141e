"""Methods side by side: cells, choices and the table."""
