"""The parts of tools/fuzz.py: how examples are made, and the readers that are given them."""
