"""Remotes: places that stores share, which hold packs and a log. Push and pull (docs/remotes.md)."""
