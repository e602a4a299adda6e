"""The recipe that fully defines a run: its sections, and how it is read."""
