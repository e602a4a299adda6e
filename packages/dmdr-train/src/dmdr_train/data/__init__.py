"""The data of a run: prompts, embeddings, pairs and folders of pictures."""
