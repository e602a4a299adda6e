"""The terms of the generator's loss, their weights, and the rewards that they score with."""
