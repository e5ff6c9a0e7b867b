"""Commits to a store."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Commit:
    """Which commit of which store wrote a pack: the store's id, the commit's number, and the packs of the commits that
    it followed, which so were acknowledged. Older packs have none."""

    store: str = ""
    number: int = 0
    after: tuple[bytes, ...] = ()


NO_COMMIT = Commit()
