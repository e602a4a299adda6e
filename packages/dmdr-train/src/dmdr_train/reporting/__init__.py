"""The results of a run: tables, curves, a summary, and the exported student."""
