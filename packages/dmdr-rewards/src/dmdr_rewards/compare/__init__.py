"""Comparing two sets of pictures by their features."""
