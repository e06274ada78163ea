"""Where the pictures of instruction rows lie: in the folder of the images, or where the beginning of a name says."""

import pathlib
from collections.abc import Collection, Mapping, Sequence

from eim_jax.data.samples import FileImages, ImageSource, NoImages, file_in


class Folders:
    """The folder of the images, None where there is none, and others by the beginnings of the names in them."""

    def __init__(self, images: pathlib.Path | None, others: Mapping[str, pathlib.Path | None]):
        self.images = images
        self.others = {begin: folder for begin, folder in others.items() if folder is not None}

    def apart(self, names: Collection[str]) -> list[tuple[pathlib.Path, list[str], list[str]]]:
        """Returns (folder, names, the same without their beginnings) of each folder that some names are in."""
        found = []
        for begin, folder in {"": self.images, **self.others}.items():
            own = [name for name in names if self._begin(name) == begin]
            if own and folder is not None:
                found.append((folder, own, [name.removeprefix(begin) for name in own]))
        return found

    def source(self, names: Sequence[str]) -> ImageSource:
        """Returns the pictures of these names."""
        if any(map(self._begin, names)):
            return _Pictures(self, names)
        if self.images is None:
            return NoImages([], [], "this split has texts only")
        return FileImages(self.images, names, names)

    def _begin(self, name: str) -> str:
        return next((begin for begin in self.others if name.startswith(begin)), "")


class _Pictures(FileImages):
    """Pictures in several folders."""

    def __init__(self, folders: Folders, names: Sequence[str]):
        super().__init__(folders.images or pathlib.Path(), names, names)
        self.folders = folders

    def path(self, row: int) -> pathlib.Path:
        """Returns the file of image `row`."""
        begin = self.folders._begin(self.names[row])
        return file_in(self.folders.others[begin], self.names[row].removeprefix(begin)) if begin else super().path(row)
