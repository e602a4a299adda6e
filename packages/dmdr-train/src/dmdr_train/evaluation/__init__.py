"""Scores of the student's pictures, and sheets of samples."""
