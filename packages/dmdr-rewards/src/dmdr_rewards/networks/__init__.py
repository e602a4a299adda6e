"""The frozen networks behind the rewards, and the reading of their checkpoints."""
