"""What pear-serve holds and how fast it is."""
