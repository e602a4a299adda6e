"""The plan of a run: its operations, memory, communication, time and cost, counted without weights."""
