"""What is done to a network of any family."""
