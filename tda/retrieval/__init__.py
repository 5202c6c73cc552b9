"""Which examples are near a query: by the words that they share, and by sentence embeddings."""
