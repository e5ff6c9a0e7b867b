"""One store in a directory of this machine: its index, its packs, and the verbs on them."""
