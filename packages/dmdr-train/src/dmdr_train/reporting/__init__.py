"""What a run leaves: tables, curves, a summary, and the exported student."""
