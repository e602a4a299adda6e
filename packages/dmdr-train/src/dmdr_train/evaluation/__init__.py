"""How good the student's pictures are, and sheets of samples."""
