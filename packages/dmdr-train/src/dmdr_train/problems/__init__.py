"""The built-in problems: shapes with class labels, and scenes with captions."""
