"""Where the pictures of instruction rows lie: in the folder of the images, or where the beginning of a name says."""

import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from eim_jax.data.bad_items import BadItem
from eim_jax.data.datasets.instruct_lavin import SCIENCEQA
from eim_jax.data.image_checks import check_images
from eim_jax.data.samples import FileImages, ImageSource, NoImages, file_in

# LLaVA names COCO's images as train2017 does; the same files of 2014 (LaVIN's, VQAv2's) carry a prefix.
_COCO_PREFIXES = ("", "COCO_train2014_", "COCO_val2014_")


class Folders:
    """The folder of the images, None where there is none, and others by the beginnings of the names in them."""

    def __init__(self, images: pathlib.Path | None, others: Mapping[str, pathlib.Path | None]):
        self.images = images
        self.others = {begin: folder for begin, folder in others.items() if folder is not None}

    def file_of(self, image: str, where: str) -> str:
        """Returns the file that a row means by the name of its picture.

        Args:
          image: as the row has it.
          where: the row, for the message.

        Raises:
          ValueError: the folder for it was not given.
        """
        if self._begin(image):
            return image
        if image.startswith(SCIENCEQA):
            raise ValueError(
                f"{where}: the row has a picture of ScienceQA; set config.data.scienceqa_images to the folder "
                "that holds QID/image.png (its train split)"
            )
        if self.images is None:
            raise ValueError(f"{where}: the row has the image {image!r}; give the folder of the images")
        head, slash, tail = image.rpartition("/")
        bare = next((tail.removeprefix(prefix) for prefix in _COCO_PREFIXES[1:] if tail.startswith(prefix)), tail)
        names = [head + slash + prefix + name for name in dict.fromkeys((tail, bare)) for prefix in _COCO_PREFIXES]
        return next((name for name in names if os.path.exists(self.images / name)), image)

    def broken(self, names: Sequence[str], users: Mapping[str, str], bad: list[BadItem], **options: Any) -> set[str]:
        """Returns the files that cannot be used; each joins `bad` with the first row that asks for it.

        Args:
          names: all files, each once.
          users: the first row of each, in words.
          bad: the bad items so far.
          **options: of check_images.
        """
        found: set[str] = set()
        for folder, own, files in self.apart(names):
            problems = check_images(FileImages(folder, own, files), **options)
            bad += [BadItem("image", own[row], users[own[row]], problems[row]) for row in sorted(problems)]
            found |= {own[row] for row in problems}
        return found

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
