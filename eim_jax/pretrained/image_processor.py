"""How a folder says that its tower's pictures are made: processor_config.json, or preprocessor_config.json.

Pictures are resized to a square (utils/images) and normalised on the device. What a file says of this is taken over, or
refused by the name of its field; nothing in it is passed over.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from eim_jax.models.hugging_face import WeightsError
from eim_jax.models.vision import VISION_TOWERS
from eim_jax.pretrained.json_files import read_json
from eim_jax.utils.images import BICUBIC, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, RESAMPLING, Fit

# What transformers' image processors do where a file leaves it out, as far as they differ. DINOv2's files name Bit's,
# which has CLIP's statistics of itself; a folder without such a file has those that the tower was trained with.
_HALF = [0.5, 0.5, 0.5]
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "Bit": {},
    "DINOv2": {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)},
    "Siglip": {
        "image_mean": _HALF,
        "image_std": _HALF,
        "do_center_crop": False,
        "size": {"height": 224, "width": 224},
    },
}
_MOST = 1e6  # of a statistic, so that neither NaN, infinity nor an endless number passes
_STEPS = ("resize", "center_crop", "rescale", "normalize", "convert_rgb")


class ImageProcessor(NamedTuple):
    """What a folder says of its pictures, with its kind's values for what it leaves out.

    Attributes:
      mean, std: the channel statistics by which pixels in [0, 1] are normalised; do_normalize, do_rescale and
        rescale_factor are folded into them.
      size: `size` as the file has it, None where it has none.
      crop: whether the centre is cut out after resizing, to `crop_size` as the file has it.
      crop_size: None where the file has none.
      resample: PIL's number of the filter.
      kind: whose defaults they are, a name in DEFAULTS.
      file: where all this stands; None where there is no such file.
    """

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    size: Any = None
    crop: bool = True
    crop_size: Any = None
    resample: int = BICUBIC
    kind: str = "CLIP"
    file: pathlib.Path | None = None

    def describe(self) -> str:
        """Returns the statistics and where they come from, for the log."""
        numbers = " and ".join(
            f"{name} ({', '.join(f'{x:.6g}' for x in values)})"
            for name, values in (("mean", self.mean), ("standard deviation", self.std))
        )
        return f"{numbers}, from {self.file or f'{self.kind}: the folder has no preprocessor_config.json'}"

    @property
    def side(self) -> int | None:
        """The square's side that the file states; None where it states none, or no square."""
        edges = _edges(self.crop_size if self.crop and self.crop_size is not None else self.size)
        sides = set(edges.values()) if edges is not None else set()
        return sides.pop() if len(sides) == 1 else None

    def check(self, image_size: int, fit: str, asked: bool = False) -> Fit:
        """Returns how pictures become squares of `image_size` by `fit` ("crop" or "stretch").

        Args:
          image_size: the tower's.
          fit: config.data.fit.
          asked: the size is config.towers.image_size, not the file's: what the file resizes to grows along with it.

        Raises:
          WeightsError: the file wants other pictures.
        """
        side = self.side or image_size if asked else image_size
        shorter, square = {"shortest_edge": side}, {"height": side, "width": side}
        if self.crop and self.crop_size is not None and _edges(self.crop_size) not in (shorter, square):
            raise WeightsError(
                f"{self.file}: crop_size {self.crop_size!r} is not the tower's image_size, {side}: set "
                "config.towers.image_size to it, if the tower is to see pictures of that size"
            )
        wanted = shorter if self.size is None else _edges(self.size)
        if wanted == square and fit != "stretch":
            raise WeightsError(
                f"{self.file}: size {self.size!r} stretches pictures to a square, config.data.fit={fit!r} cuts their "
                "centre out: set config.data.fit=stretch"
            )
        # More is resized than is cut out (DINOv2: 256 and 224), where both are stated.
        wider = fit == "crop" and self.crop_size is not None and wanted.keys() == {"shortest_edge"}
        margin = wanted["shortest_edge"] / side if wider and self.crop else 1.0
        if margin <= 1 and wanted not in (shorter, square) and (fit != "stretch" or "height" in wanted):
            raise WeightsError(
                f"{self.file}: size {self.size!r} is not the tower's image_size, {side}, to which "
                f"config.data.fit={fit!r} resizes; set size to {shorter!r}, if the tower was trained so"
            )
        if not self.crop and fit != "stretch":
            raise WeightsError(
                f"{self.file}: do_center_crop is false, config.data.fit={fit!r} cuts the centre out: set "
                "config.data.fit=stretch, or do_center_crop to true"
            )
        return Fit(fit, margin, self.resample)


def _edges(size: Any) -> Any:
    """A `size` as an object: a number is the shorter side's length, as in CLIP's older files."""
    return {"shortest_edge": size} if isinstance(size, int) else size


def image_processor(directory: pathlib.Path) -> ImageProcessor:
    """Returns what a folder says of its pictures; as transformers does, a processor_config.json's nested one wins.

    Raises:
      WeightsError: a field of a wrong type, or one that states what is not done here; named by file and field.
    """
    kind = _kind_of(directory)
    nested, plain = directory / "processor_config.json", directory / "preprocessor_config.json"
    if nested.is_file() and (content := read_json(nested).get("image_processor")) is not None:
        if not isinstance(content, dict):
            raise WeightsError(f"{nested}: image_processor is {content!r:.60}, not an object")
        return _read(nested, content, kind)
    if plain.is_file():
        return _read(plain, read_json(plain), kind)
    usual = DEFAULTS[kind]
    mean, std = (tuple(usual.get(f"image_{x}", clip)) for x, clip in (("mean", CLIP_MEAN), ("std", CLIP_STD)))
    return ImageProcessor(mean, std, kind=kind)


def _kind_of(directory: pathlib.Path) -> str:
    """The kind of a folder whose files name none: its tower's family's."""
    config = directory / "config.json"
    name = read_json(config).get("model_type") if config.is_file() else None
    family = VISION_TOWERS.get(name) if isinstance(name, str) else None
    return family.processor if family is not None else "CLIP"


def _read(file: pathlib.Path, content: Mapping[str, Any], kind: str) -> ImageProcessor:
    said = {k: v for k, v in content.items() if v is not None}
    named = str(said.get("image_processor_type", said.get("feature_extractor_type", kind)))
    kind = re.sub(r"(ImageProcessor|FeatureExtractor)(Fast|Pil)?$", "", named)
    kind = "CLIP" if kind.startswith("CLIP") else kind
    said = {**DEFAULTS.get(kind, {}), **said}
    if kind not in DEFAULTS:
        left = [k for k in ("size", "resample", "do_center_crop", "image_mean", "image_std") if k not in said]
        if left:
            raise WeightsError(
                f"{file}: image_processor_type {named!r} has its own defaults for {', '.join(left)}: write them down"
            )
    does = {step: said.get(f"do_{step}", True) for step in _STEPS}
    for step, value in does.items():
        if not isinstance(value, bool):
            raise WeightsError(f"{file}: do_{step} is {value!r:.60}, not true or false")
    if not does["resize"]:
        raise WeightsError(f"{file}: do_resize is false, which is not supported: pictures get the tower's size")
    if type(resample := said.get("resample", BICUBIC)) is not int or resample not in RESAMPLING:
        known = " and ".join(f"{number} ({name})" for number, name in RESAMPLING.items())
        raise WeightsError(f"{file}: resample {resample!r:.60} is not supported, only {known}")
    for field in ("size", "crop_size"):
        sides = said.get(field, 1)
        sides = list(sides.values()) or [None] if isinstance(sides, dict) else [sides]
        if not all(type(side) is int and side > 0 for side in sides):
            raise WeightsError(f"{file}: {field} is {said[field]!r:.60}; pixels are needed, a number or by side")
    mean = _channels(file, said, "image_mean", CLIP_MEAN) if does["normalize"] else (0.0, 0.0, 0.0)
    std = _channels(file, said, "image_std", CLIP_STD) if does["normalize"] else (1.0, 1.0, 1.0)
    if min(std) <= 0:
        raise WeightsError(f"{file}: image_std {std} must be above 0")
    factor = said.get("rescale_factor", 1 / 255)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < _MOST:
        raise WeightsError(f"{file}: rescale_factor is {factor!r:.60}, not a number above 0")
    # (f x - mean) / std over grey levels x is (x / 255 - mean / 255f) / (std / 255f), which is how we normalise.
    scale = 255 * (factor if does["rescale"] else 1)
    if not math.isclose(scale, 1):
        mean, std = (tuple(x / scale for x in values) for values in (mean, std))
    return ImageProcessor(mean, std, said.get("size"), does["center_crop"], said.get("crop_size"), resample, kind, file)


def _channels(file: pathlib.Path, said: Mapping[str, Any], field: str, default: tuple) -> tuple[float, ...]:
    """Three numbers; one number stands for three."""
    values = said.get(field, default)
    values = [values] * 3 if isinstance(values, int | float) else values
    numbers = isinstance(values, list | tuple) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and -_MOST < x < _MOST for x in values
    )
    if not numbers or len(values) != 3:
        raise WeightsError(f"{file}: {field} is {said.get(field)!r:.60}, not one number for each of three channels")
    return tuple(float(x) for x in values)
