"""Which models there are, where they come from and what state they are in."""
