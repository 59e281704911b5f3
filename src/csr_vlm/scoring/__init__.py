"""Score sentences by their relevance to an image."""
