"""The parts of the program dmdr-score."""
