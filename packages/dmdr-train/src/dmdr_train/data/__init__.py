"""What a run learns from: prompts, embeddings, pairs and folders of pictures."""
