"""A stranger's package adds an objective, a model family, a tracker and a reward; no file of dmdr knows it."""
