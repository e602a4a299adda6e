"""What a family is, and the base classes that families share."""
