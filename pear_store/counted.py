"""How a message says how many there are."""


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """Such as "1 task" and "1,234 tasks".

    Args:
        nouns: the plural, if it is not `noun` with an s.
    """
    return f"{count:,} {noun if count == 1 else nouns or f'{noun}s'}"
