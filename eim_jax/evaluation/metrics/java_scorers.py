"""The reference scorers that are Java programs: PTB tokens, METEOR 1.5 and SPICE 1.0, by pycocoevalcap's jars."""

import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Hashable, Sequence

from eim_jax.evaluation.metrics.ptb import DROPPED

TOKENISER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
SPICE_JARS = (
    "spice/spice-1.0.jar",
    "spice/lib/stanford-corenlp-3.6.0.jar",
    "spice/lib/stanford-corenlp-3.6.0-models.jar",
)
# Without these METEOR reads "0.5" as text under locales with a decimal comma, and captions under the locale's charset.
JAVA_FLAGS = ("-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
# SPICE 1.0 reflects on JDK internals; Java 8 does not know the flag and does not read this variable.
SPICE_ENVIRONMENT = {
    "JDK_JAVA_OPTIONS": " ".join(
        f"--add-opens=java.base/{package}=ALL-UNNAMED"
        for package in ("java.lang", "java.math", "java.util", "java.util.concurrent", "java.net", "java.text")
    )
}

Tokenised = dict[Hashable, list[str]]


def package_folder() -> pathlib.Path:
    """Returns the folder of the installed pycocoevalcap.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None:
        raise ModuleNotFoundError("caption scores need the package pycocoevalcap 1.2")
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def java_executable() -> str | None:
    """Returns the Java executable of JAVA_HOME or of the path, None where there is none."""
    home = os.environ.get("JAVA_HOME")
    return (shutil.which("java", path=os.path.join(home, "bin")) if home else None) or shutil.which("java")


def _one_line(caption: str) -> str:
    # The reference only replaces \n, but its tokeniser also breaks lines at \r, \v, \f, U+2028, ..., which would shift
    # every later caption by one.
    return " ".join(caption.split())


def tokenise_java(captions: Sequence[str], java: str) -> list[str]:
    """Returns what ptb.ptb_captions returns, by the reference's own jar.

    Args:
      captions: any text.
      java: the Java executable.

    Raises:
      RuntimeError: Java failed or did not answer line for line.
    """
    command = [java, *JAVA_FLAGS, "-cp", str(package_folder() / TOKENISER_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    text = "\n".join(map(_one_line, captions)) + "\n"
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        raise RuntimeError(
            f"PTBTokenizer: {len(lines)} lines for {len(captions)} captions. {done.stderr.decode()[-300:]}"
        )
    return [" ".join(token for token in line.rstrip().split(" ") if token not in DROPPED) for line in lines]


def meteor(references: Tokenised, results: Tokenised, java: str) -> float:
    """Returns METEOR 1.5 by the reference jar.

    Args:
      references: tokenised, of each key.
      results: tokenised, one a key.
      java: the Java executable.

    Raises:
      RuntimeError: the jar failed.
    """
    jar = package_folder() / METEOR_JAR
    command = [java, *JAVA_FLAGS, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=jar.parent, encoding="utf-8", **pipes) as process:

        def answer(line: str) -> str:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        try:
            statistics = []
            for key, (result,) in results.items():
                result = result.replace("|||", "").replace("  ", " ")  # the protocol's separator, as the reference
                statistics.append(answer(" ||| ".join(("SCORE", *references[key], result))))
            scores = [float(answer(" ||| ".join(("EVAL", *statistics))))]
            scores += [float(process.stdout.readline()) for _ in results]
        except (OSError, ValueError) as error:
            raise RuntimeError(f"the METEOR jar failed: {error}") from error
        finally:
            process.kill()
    return scores[-1]  # one line an image, then the corpus


def spice(references: Tokenised, results: Tokenised, java: str) -> float:
    """Returns SPICE 1.0 by the reference jar.

    Args:
      references: tokenised, of each key.
      results: tokenised, one a key.
      java: the Java executable.

    Raises:
      RuntimeError: the jar failed.
    """
    jar = package_folder() / SPICE_JARS[0]
    images = [{"image_id": k, "test": results[k][0], "refs": references[k]} for k in results]
    with tempfile.TemporaryDirectory() as folder:
        source, target, cache = (pathlib.Path(folder) / name for name in ("in.json", "out.json", "cache"))
        source.write_text(json.dumps(images))
        cache.mkdir()
        command = [
            java,
            *JAVA_FLAGS,
            "-Xmx8G",
            "-jar",
            str(jar),
            str(source),
            "-cache",
            str(cache),
            "-out",
            str(target),
        ]
        command += ["-subset", "-silent"]
        environment = {**os.environ, **SPICE_ENVIRONMENT}
        done = subprocess.run(command, cwd=jar.parent, capture_output=True, env=environment, check=False)
        if done.returncode or not target.is_file():
            raise RuntimeError(f"the SPICE jar failed: {done.stderr.decode()[-300:]}")
        scores = [image["scores"]["All"]["f"] for image in json.loads(target.read_text())]
    return math.fsum(float("nan") if s is None else float(s) for s in scores) / len(scores)
