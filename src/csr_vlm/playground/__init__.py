"""Try the policies of a run on a picture, in a terminal or on a page."""
