"""Decides which folders are splits and which are classes. In doubt it asks the user; it never guesses."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pear_train.data.listing import Listing
from pear_train.data.options import NO_SPLIT, DataOptions
from pear_train.errors import DataError

_WORDS = {
    "train": r"train(?:ing|s)?|trn",
    "val": r"val(?:s|id(?:ation|ate)?)?|dev(?:el|elopment)?|eval(?:uation|uate)?",
    "test": r"test(?:ing|s)?|tst",
}
_FILLER = r"(?:seg|raw|images?|imgs?|pics?|pictures?|photos?|data|sets?|splits?|folders?|files?|samples?)"
_SPLIT_NAMES = {
    role: re.compile(f"{_FILLER}*(?:{words}){_FILLER}*", re.IGNORECASE | re.ASCII) for role, words in _WORDS.items()
}
_LONE_WORD = re.compile("|".join([*_WORDS.values(), "holdout"]))


def split_of(name: str) -> str | None:
    """train, val or test, if a folder's name means just that in a usual spelling: Train, training_set, test1."""
    letters = re.sub(r"[\W\d_]+", "", name)
    return next((role for role, pattern in _SPLIT_NAMES.items() if pattern.fullmatch(letters)), None)


def by_folder(paths: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The paths without a folder, and for every top folder the paths below it."""
    direct: list[str] = []
    below: dict[str, list[str]] = {}
    for path in paths:
        folder, slash, rest = path.partition("/")
        if slash:
            below.setdefault(folder, []).append(rest)
        else:
            direct.append(path)
    return direct, below


def lone_folder(listing: Listing) -> str | None:
    """The only folder, if it holds classes or splits. None if it is a class or a split itself."""
    direct, below = by_folder(listing.pictures)
    names = listing.folders_in("")
    if direct or len(names) != 1 or not below:
        return None
    within = by_folder(below[names[0]])[1]
    if split_of(names[0]) is not None and not all(map(split_of, within)):
        return None
    return names[0] if within else None


def choose_splits(where: Path, pictures: list[str], options: DataOptions, needs_train: bool = True) -> dict[str, str]:
    """The folder of each split. Empty if the folders are classes.

    Args:
        where: the data set, for messages.
        pictures: paths relative to it.
        needs_train: whether a train split must be among them.
    Raises:
        DataError: names leave it in doubt (the message says which options decide), or a named split does not exist.
    """
    folders = by_folder(pictures)[1]
    if options.no_splits:
        return {}
    if any(options.named.values()):
        return _named_splits(where, pictures, folders, options, needs_train)
    candidates = {name: role for name in folders if (role := split_of(name)) is not None}
    classes_within = {name: set(by_folder(paths)[1]) for name, paths in folders.items()}
    others = [name for name in folders if name not in candidates]
    if not candidates:
        hints = [_hinted(name) for name in folders]
        if len(folders) > 1 and all(hints) and len(set(hints)) > 1:
            raise _unsure(where, folders, "but their names say more than that")
        _refuse_splits_within(where, classes_within)
        return {}
    if others:
        flat = [name for name in candidates if not classes_within[name]]
        if [name.casefold() for name in flat] == ["train"] == [name.casefold() for name in candidates]:
            return {}  # a class of trains beside other classes: a split would hold folders
        shared = set.intersection(*(classes_within[name] for name in candidates))
        if len(candidates) < 2 or not shared:
            raise _unsure(where, candidates, f"but {_listed(others)} is beside them")
        alike = [name for name in others if shared & classes_within[name]]
        if alike:
            raise _unsure(where, [*candidates, *alike], "but not all by their names")
    if needs_train and "train" not in candidates.values():
        raise DataError(
            f"{where}: has {_listed(candidates)} but no train/: expected train/, or classes without split folders; "
            f"give --train-split NAME, or --no-splits if these are classes"
        )
    if len(folders) > 1:
        for name in candidates:
            if not classes_within[name]:
                raise _unsure(where, candidates, f"but {name}/ has no class folders")
    chosen: dict[str, str] = {}
    for name, role in candidates.items():
        if role in chosen:
            raise _unsure(where, [chosen[role], name], f"and both could be {role}")
        chosen[role] = name
    return chosen


def _named_splits(
    where: Path, pictures: list[str], folders: Mapping[str, list[str]], options: DataOptions, needs_train: bool
) -> dict[str, str]:
    """The splits that the user named, and those others whose names leave no doubt."""
    chosen: dict[str, str] = {}
    for role, folder in options.named.items():
        if folder is None or folder == NO_SPLIT:
            continue
        chosen[role] = folder.strip("/")
        if not any(path.startswith(f"{chosen[role]}/") for path in pictures):
            there = _listed(folders) if folders else "no folder with pictures"
            raise DataError(f"{where}: --{role}-split {folder}: expected a folder with pictures, found {there}")
    if len(set(chosen.values())) < len(chosen):
        raise DataError(f"{where}: expected a folder for each split, found one for two: {_listed(chosen.values())}")
    for role, folder in options.named.items():
        if folder is not None:
            continue
        free = [name for name in folders if split_of(name) == role and name not in chosen.values()]
        if len(free) > 1:
            raise _unsure(where, free, f"and each could be {role}")
        if free:
            chosen[role] = free[0]
    if needs_train and "train" not in chosen:
        raise DataError(f"{where}: no folder is recognised as train, found {_listed(folders)}: give --train-split NAME")
    return chosen


def _refuse_splits_within(where: Path, classes_within: Mapping[str, set[str]]) -> None:
    """Raises a DataError if a class folder holds splits, because train and test pictures would be mixed."""
    for name, within in classes_within.items():
        roles = {split_of(folder) for folder in within}
        if "train" in roles and len(roles - {None}) > 1:
            raise DataError(
                f"{where}: {name}/ holds {_listed(within)}, which look like splits inside of a class: expected "
                f"train/{name}/…; give --no-splits if all of it is one class"
            )


def _hinted(name: str) -> str | None:
    """The word for a split that is part of a name, such as flowers_test."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()
    return next((word for word in re.findall(r"[a-z]+", apart) if _LONE_WORD.fullmatch(word)), None)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"{name}/" for name in sorted(names))


def _unsure(where: Path, names: Iterable[str], why: str) -> DataError:
    return DataError(
        f"{where}: {_listed(names)} look like splits, {why}: name the splits with --train-split NAME, --val-split NAME "
        f"and --test-split NAME (none: there is none), or give --no-splits if the folders are classes"
    )
