"""Formats of bytes: digests, containers, checkpoints, manifests, packs' records. Knows no directory and no index."""
