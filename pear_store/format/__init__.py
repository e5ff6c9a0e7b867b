"""What bytes mean: digests, containers, checkpoints, manifests, packs' records. Knows no directory and no index."""
