"""Pictures of episodes, embeddings and results."""
