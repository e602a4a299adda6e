"""Texts and class labels: their checks, BERT's tokens, and a cache of text embeddings."""
