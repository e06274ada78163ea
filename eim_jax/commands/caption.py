"""`--mode=caption`: captions of image files by a trained arm."""

from collections.abc import Sequence
from pathlib import Path

from eim_jax.commands.trained_arms import load_finished, trained, why_blind
from eim_jax.config import Config, ConfigError
from eim_jax.data.bad_items import name_problem, printable
from eim_jax.data.datasets import data_set
from eim_jax.data.image_checks import file_problem
from eim_jax.data.samples import FileImages, Split
from eim_jax.generation.batched_inference import generate_text
from eim_jax.generation.visual_tokens import encode_images
from eim_jax.utils.console import console
from eim_jax.utils.files import user_path, write_json
from eim_jax.utils.picture_files import SUFFIXES


def caption(
    config: Config, workdir: Path | None, arm: str, images: list[Path], out: Path | None, *, init: bool = False
) -> None:
    """Captions image files, or all images in folders, with a trained arm; prints them and writes JSON.

    Args:
      config: the run's.
      workdir: of the finished run; may be None with `init`.
      arm: which of its arms.
      images: files and folders.
      out: the JSON file, [{"image_id": file, "caption"}]; None: they are printed alone.
      init: captions by config.init as it is, in place of what was trained.

    Raises:
      ConfigError: the run does not caption, or an image cannot be read.
    """
    if data_set(config.data).prompt is not None:
        raise ConfigError("this run was trained to follow instructions: ask it with --mode=chat --image=FILE")
    files = pictures_of(images)
    inputs = load_finished(config, workdir)
    vlm, params = trained(inputs, arm, init=init)
    if init and (reason := why_blind(inputs, arm, vlm, params)):
        raise ConfigError(reason)
    ids = [str(file) for file in files]
    split = Split("your", (), FileImages(Path(), ids, ids))
    rows, method = list(range(len(files))), config.decode.methods[0]
    seen = encode_images(inputs, vlm, params, split, rows)
    captions = generate_text(inputs, vlm, params, seen, rows, [""] * len(rows), method, f"captions by {method}")
    for name, words in zip(ids, captions, strict=True):
        console.print(f"{name}: {words}", soft_wrap=True)
    if out is not None:
        write_json(out, [{"image_id": name, "caption": words} for name, words in zip(ids, captions, strict=True)])
        console.print(f"written to {out}", soft_wrap=True)


def places_of(asked: str) -> list[Path]:
    """Returns the files and folders of `--images=A,B`; a comma may be part of a name, where such a file is there.

    Raises:
      ConfigError: a place is neither a file nor a folder.
    """
    parts, places = asked.split(","), []
    while parts:
        # The longest beginning that exists: "a, b.jpg" is one file where it is there, else "a" and "b.jpg".
        for count in range(len(parts), 0, -1):
            whole = ",".join(parts[:count])
            found = next((path for name in (whole, whole.strip()) if (path := user_path(name)).exists()), None)
            if found is not None or count == 1:
                break
        if found is None and whole.strip():
            raise ConfigError(f"--images: no file or folder {whole.strip()}")
        places += [found] if found is not None and whole.strip() else []
        del parts[:count]
    return places


def place_of(name: str) -> Path:
    """Returns one file or folder of the command line.

    Raises:
      ConfigError: it is neither.
    """
    if not (place := user_path(name)).exists():
        raise ConfigError(f"no file or folder {name}")
    return place


def pictures_of(places: Sequence[Path]) -> list[Path]:
    """Returns the pictures among files and folders, each of them decoded once; says what of a folder is left out.

    Raises:
      ConfigError: a file that was named, or that has a picture's suffix, cannot be read; all are listed.
    """
    files, bad = [], []
    for place in places:
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
        found = []
        for file in inside:
            problem = name_problem(str(file)) or ("a folder in a folder" if file.is_dir() else file_problem(file))
            if problem is None:
                found.append(file)
            elif place.is_dir() and (file.is_dir() or file.suffix.lower() not in SUFFIXES):
                console.print(f"left out {printable(str(file))}: {problem}", soft_wrap=True)
            else:
                bad.append(f"{printable(str(file))}: {problem}")
        if not found and not bad:
            raise ConfigError(f"--images: the folder {place} holds no picture ({', '.join(sorted(SUFFIXES))})")
        files += found
    if bad:
        raise ConfigError("--images: these cannot be captioned:\n  " + "\n  ".join(bad))
    return files
