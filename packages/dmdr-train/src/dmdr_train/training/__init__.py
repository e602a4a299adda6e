"""The training step, the networks that it trains, and what rewards see of a sample."""
