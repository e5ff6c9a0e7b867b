"""Reads files on the Hugging Face Hub, through huggingface_hub's file system: ``hf://owner/name[@revision][/file]``.

A repository may be a stranger's. Only one path is asked for. Its size is checked first, and no more than the caller's
limit is read. No folder is listed, because it may hold a million files.
"""

from pear_store.errors import NotFoundError, PearStoreError, SourceError
from pear_store.files import ending
from pear_store.format.checkpoint import HUB_CHECKPOINT

HUB = "hf://"


def checkpoint_url(url: str) -> str:
    """The URL of a task checkpoint. For a repository or a folder, that is the file in it that `export-hub` writes."""
    return url if ending(url) == ".safetensors" else f"{url.rstrip('/')}/{HUB_CHECKPOINT}"


def read_hub(url: str, most_bytes: int) -> bytes:
    """All bytes of a file on the Hub. Credentials are huggingface_hub's own (``hf auth login``, ``HF_TOKEN``).

    Raises:
        NotFoundError: there is no such repository, revision or file, or the repository is private.
        SourceError: it cannot be read, is a folder, or has more than `most_bytes`.
    """
    try:
        from huggingface_hub import HfFileSystem
        from huggingface_hub import errors as theirs
    except ImportError:
        raise SourceError(url, "needs the package huggingface_hub: pip install 'pear-adapters[hub]'") from None
    try:
        # expand_info asks for the one path only; without it, the whole folder is listed
        files = HfFileSystem(expand_info=True, skip_instance_cache=True)
        found = files.info(url)
        if found["type"] != "file":
            raise SourceError(url, "expected a file, found a folder")
        if found["size"] > most_bytes:
            raise SourceError(url, f"more than {most_bytes} bytes: larger files are not read")
        with files.open(url, "rb", block_size=0) as file:  # 0: a stream, which reads no more than is asked for
            data: bytes = file.read(most_bytes + 1)
    except PearStoreError:
        raise
    except Exception as error:  # huggingface_hub's own errors, its HTTP client's, and those of unexpected answers
        cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
        if isinstance(cause, theirs.GatedRepoError):
            raise SourceError(url, "the repository is gated: ask for access on its page, then log in") from None
        if isinstance(cause, theirs.RevisionNotFoundError):
            raise NotFoundError(f"{url}: no such revision") from None
        if isinstance(cause, theirs.RepositoryNotFoundError):
            remedy = "if it is private, log in with 'hf auth login' or set HF_TOKEN"
            raise NotFoundError(f"{url}: no such repository; {remedy}") from None
        if isinstance(cause, FileNotFoundError | theirs.EntryNotFoundError):
            raise NotFoundError(f"{url}: no such file") from None
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise SourceError(url, f"cannot be read: {reason}") from None
    return data
