"""A run's state and report while others ask for them: read anew when its files change, never written."""

import hashlib
import tempfile
import threading
from pathlib import Path

from PIL import Image

from eim_jax.config import Config
from eim_jax.data.datasets import load_split
from eim_jax.data.samples import Split
from eim_jax.evaluation.scoring import EVALS, SCORES
from eim_jax.evaluation.tasks import TASKS, task_of
from eim_jax.reporting.page import render
from eim_jax.reporting.progress import Progress, read_progress
from eim_jax.utils.files import Damaged

_FILES = ("run.json", "metrics.jsonl", SCORES, "predictions_test.json", "items_test.json")
_SCRIPT = '<script src="report.js" defer></script>'


class FollowedRun:
    """The work directory of a run that may be going on; its methods may be called by any thread.

    Args:
      config: the run's.
      workdir: it is read alone: what its data keep for themselves goes to a folder of this process.
    """

    def __init__(self, config: Config, workdir: Path) -> None:
        self._config, self._workdir = config, workdir
        self._one = threading.Lock()
        self._page: tuple[str, str] = ("", "")  # version, page
        self._test: Split | None = None
        self._own = tempfile.TemporaryDirectory(prefix="eim_jax-", ignore_cleanup_errors=True)

    def close(self) -> None:
        """Removes what the data kept for themselves."""
        self._own.cleanup()

    def progress(self) -> Progress:
        """Returns how far the run is."""
        return read_progress(self._workdir)

    def version(self) -> str:
        """Returns what changes when the report would."""
        files = [self._workdir / "run.json", self._workdir / "report.html"]
        for arm in self._config.arms:
            files += [self._workdir / arm / name for name in _FILES]
            files += sorted((self._workdir / arm).glob(f"{EVALS}/*/{SCORES}"))
        return hashlib.sha256(repr([(str(file), _state(file)) for file in files]).encode()).hexdigest()[:16]

    def report(self) -> str:
        """Returns the report as the run's files say now, with the script that renews it in the browser.

        Raises:
          Damaged, ValueError: a file is not what a run writes; the message names it.
        """
        with self._one:
            version = self.version()
            if self._page[0] != version:
                self._page = (version, self._written() or self._renewed())
            page = self._page[1]
        return page.replace("</head>", f'<meta name="version" content="{version}">\n{_SCRIPT}\n</head>', 1)

    def _written(self) -> str | None:
        """The page that the run wrote in its end, None where it is older than what it shows."""
        path = self._workdir / "report.html"
        parts = [self._workdir / arm / name for arm in self._config.arms for name in _FILES]
        if not path.exists() or any(part.exists() and part.stat().st_mtime > path.stat().st_mtime for part in parts):
            return None
        return path.read_text(encoding="utf-8")

    def _renewed(self) -> str:
        """The page as it would be written now; where its data are gone, the one that the run wrote."""
        try:
            return self._rendered()
        except Damaged:  # the run's own file: an older page would hide it
            raise
        except (OSError, ValueError):
            path = self._workdir / "report.html"
            if not path.exists():
                raise
            return path.read_text(encoding="utf-8")

    def _rendered(self) -> str:
        # The test data are loaded once there is something to show beside them.
        if not any((self._workdir / arm / "predictions_test.json").exists() for arm in self._config.arms):
            return render(self._workdir, next(iter(TASKS.values())), lambda image: None, {})
        if self._test is None:
            self._test = load_split(self._config, "test", Path(self._own.name))
        test = self._test
        assert test is not None, "predictions are those of a test split"
        where = {id_: row for row, id_ in enumerate(test.images.ids)}

        def picture(image_id: str) -> Image.Image:
            return test.images[where[str(image_id)]]

        task = task_of(test)
        return render(self._workdir, task, picture, test.references, task.items(test, self._config.data.eval_limit))


def _state(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size
