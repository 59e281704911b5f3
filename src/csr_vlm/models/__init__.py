"""Load policies and their checkpoints, and encode prompts for them."""
