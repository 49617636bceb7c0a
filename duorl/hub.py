"""The Hugging Face hub: files that are fetched from it, and folders that are sent to it.

A name on the hub is `owner/name`, or `owner/name@revision`. Fetched files stay in the cache of huggingface_hub.

    with using(token="...", cache_dir="cache"):
        fetch("owner/name", "config.json")
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")  # `../name` is a path
OPTIONS = ("token", "cache_dir", "local_files_only", "force_download")
"""The options of `using`."""

_options: ContextVar[dict[str, Any] | None] = ContextVar("options", default=None)


@contextmanager
def using(**options: Any) -> Iterator[None]:
    """In this block, files are fetched with options of huggingface_hub: those in `OPTIONS`."""
    token = _options.set(options)
    try:
        yield
    finally:
        _options.reset(token)


def options() -> dict[str, Any]:
    """The options of the innermost `using`."""
    return dict(_options.get() or {})


def split_name(name: str) -> tuple[str, str | None] | None:
    """The repository and the revision in a name on the hub; None if the name has another form."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else None


def fetch(repository: str, file: str, revision: str | None = None) -> Path:
    """One file of a repository, from the cache or the hub. Its folder is named after the commit.

    Raises:
        OSError: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download

    with _told(repository, revision):
        return Path(hf_hub_download(repository, file, revision=revision, **options()))


def snapshot(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A folder with those files of a repository whose names match, from the cache or the hub.

    Raises:
        OSError: they cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    with _told(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns), **options()))


def remote_name(name: str | Path) -> tuple[str, str | None] | None:
    """As `split_name`, for what may be a path: None if it is there, or the folder that it would be in."""
    path = Path(name)
    is_local = path.exists() or (path.parent != Path() and path.parent.is_dir())
    return None if is_local else split_name(str(name))


def push(
    folder: str | Path, repository: str, *, private: bool | None = None, token: str | None = None, **more: Any
) -> str:
    """Send a folder to the hub, and make its repository if there is none. Other files there stay.

    Args:
        folder: the folder.
        repository: `owner/name`.
        private: whether a new repository is private.
        token: of the hub; by default that of `hf auth login`.
        more: further arguments of `huggingface_hub.HfApi.upload_folder`.

    Returns:
        The address of the commit.

    Raises:
        OSError: the hub cannot be reached, or refuses it.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi(token=token)
    with _told(repository, more.get("revision")):
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=str(folder), **more).commit_url)


@contextmanager
def _told(repository: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub in one line that says what to do."""
    from huggingface_hub import errors

    name = repository if revision is None else f"{repository}@{revision}"
    try:
        yield
    except errors.LocalEntryNotFoundError as problem:
        said = f"{name} is not in the hub's cache here, and the hub cannot be reached"
        raise OSError(f"{said}: fetch it once with a network, or give a folder") from problem
    except errors.GatedRepoError as problem:
        raise OSError(f"{name} is gated: accept its terms on the hub and log in with `hf auth login`") from problem
    except errors.RepositoryNotFoundError as problem:
        said = f"the hub has no {name}, or you may not see it"
        raise OSError(f"{said}: check the name, or log in with `hf auth login`") from problem
    except errors.RevisionNotFoundError as problem:
        raise OSError(
            f"{repository} has no revision {revision!r} on the hub: name a branch, tag or commit"
        ) from problem
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as problem:
        raise OSError(f"{name} on the hub: {' '.join(str(problem).split())}") from problem
