"""What a reward is, what is known about each, and how one is created by name."""
