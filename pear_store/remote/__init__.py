"""Other places than this machine's disk: packs and a log there, push and pull (docs/remotes.md)."""
