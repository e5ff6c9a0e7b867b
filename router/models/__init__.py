"""Backbones that ship with the package."""
