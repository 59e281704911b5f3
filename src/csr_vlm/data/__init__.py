"""Read prompts, images and preference pairs, and write pairs, in the formats of other programs."""
