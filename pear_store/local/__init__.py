"""A store in a directory of this machine: its index, its packs, and what can be done with them."""
