"""`--mode=caption`: captions of image files by a trained arm."""

from pathlib import Path

from eim_jax.commands.trained_arms import load_finished, trained
from eim_jax.config import Config, ConfigError
from eim_jax.data.datasets import data_set
from eim_jax.data.image_checks import file_problem
from eim_jax.data.samples import FileImages, Split
from eim_jax.generation.batched_inference import generate_text
from eim_jax.generation.visual_tokens import encode_images
from eim_jax.utils.console import console
from eim_jax.utils.files import write_json

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def caption(config: Config, workdir: Path, arm: str, images: list[Path], out: Path) -> None:
    """Captions image files, or all images in folders, with a trained arm; prints them and writes JSON.

    Args:
      config: the run's.
      workdir: of the finished run.
      arm: which of its arms.
      images: files and folders.
      out: the JSON file, [{"image_id": file, "caption"}].

    Raises:
      ConfigError: the run does not caption, or an image cannot be read.
    """
    if data_set(config.data).prompt is not None:
        raise ConfigError("this run was trained to follow instructions: ask it with --mode=chat --image=FILE")
    files = _pictures(images)
    problems = {file: file_problem(file) for file in files}
    bad = [f"{file}: {problem}" for file, problem in problems.items() if problem]
    if bad:
        raise ConfigError("--images: these cannot be captioned:\n  " + "\n  ".join(bad))
    inputs = load_finished(config, workdir)
    vlm, params = trained(inputs, arm)
    ids = [str(file) for file in files]
    split = Split("your", (), FileImages(Path(), ids, ids))
    rows, method = list(range(len(files))), config.decode.methods[0]
    seen = encode_images(inputs, vlm, params, split, rows)
    captions = generate_text(inputs, vlm, params, seen, rows, [""] * len(rows), method, f"captions by {method}")
    for name, words in zip(ids, captions, strict=True):
        console.print(f"{name}: {words}", soft_wrap=True)
    write_json(out, [{"image_id": name, "caption": words} for name, words in zip(ids, captions, strict=True)])
    console.print(f"written to {out}", soft_wrap=True)


def _pictures(places: list[Path]) -> list[Path]:
    files = []
    for place in places:
        if place.is_dir():
            inside = sorted(f for f in place.iterdir() if f.suffix.lower() in PICTURES)
            if not inside:
                raise ConfigError(f"--images: the folder {place} holds no picture ({', '.join(sorted(PICTURES))})")
            files += inside
        elif place.exists():
            files.append(place)
        else:
            raise ConfigError(f"--images: no file or folder {place}")
    return files
