"""The formats of lists: how the files of each are read."""
