"""A copy of a run's folder on another machine: what changes in it is sent as bytes, and written where the run stands.

sent = Mirror(folder).changes()      # there, again and again
apply(changes, run)                  # here
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from duorl.files import finished, writing

_GROWING = "events.out.tfevents"  # TensorBoard's files only grow, so their new end is enough


@dataclass(frozen=True)
class Change:
    """What became of one file.

    Args:
        path: in the run's folder.
        content: its new bytes; None: the file was deleted.
        start: where in the file the bytes begin; above 0 only in files that grow.
    """

    path: str
    content: bytes | None
    start: int = 0


class Mirror:
    """Finds what changed in a folder since the last look.

    Args:
        folder: the folder; the files that are in it now are known already.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._known = self._look()

    def changes(self) -> list[Change]:
        """Files that are new, changed or gone since the last call."""
        before, self._known = self._known, self._look()
        gone = [Change(path, None) for path in before.keys() - self._known.keys()]
        changed = [path for path, seen in self._known.items() if seen != before.get(path)]
        return gone + [self._changed(path, before.get(path, (0, 0))[1]) for path in changed]

    def _changed(self, path: str, known: int) -> Change:
        growing, size = PurePosixPath(path).name.startswith(_GROWING), self._known[path][1]
        start = known if growing else 0
        with (self.folder / path).open("rb") as file:
            file.seek(start)
            # Another file may have taken its place since the look; then it is sent whole, and once more.
            return Change(path, file.read(size - start) if growing else file.read(), start)

    def _look(self) -> dict[str, tuple[int, int]]:
        """Time and size of every finished file."""
        found = {}
        for path in finished(self.folder):
            with suppress(FileNotFoundError):  # it goes meanwhile
                known = path.stat()
                found[path.relative_to(self.folder).as_posix()] = (known.st_mtime_ns, known.st_size)
        return found


def apply(changes: Iterable[Change], folder: Path) -> None:
    """Do in a folder what was done in its mirror.

    Raises:
        ValueError: a change is outside of the folder.
    """
    for change in changes:
        path = _inside(folder, change.path)
        if change.content is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if change.start:
            with path.open("r+b") as file:
                file.seek(change.start)
                file.write(change.content)
        else:
            with writing(path) as beside:
                beside.write_bytes(change.content)


def gathered(folder: Path, parts: Iterable[Path]) -> dict[str, bytes]:
    """The files of some parts of a folder, files or folders, by their paths in it."""
    files = [file for part in parts for file in ([part] if part.is_file() else finished(part))]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def scatter(files: Mapping[str, bytes], folder: Path) -> None:
    """Write gathered files into another folder."""
    apply([Change(path, content) for path, content in files.items()], folder)


def _inside(folder: Path, path: str) -> Path:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"{path} is outside of the run's folder")
    return folder / path
