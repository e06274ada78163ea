"""Keys of a queue that is being built, on disk in parts: a build that was stopped goes on behind the last of them."""

import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from eim_jax.losses.queue_files import stored_dtype
from eim_jax.losses.queue_steps import Steps
from eim_jax.parallel.processes import barrier, is_first
from eim_jax.utils.files import Damaged, check_sums, flush, read_json, read_rows, room_in, sha256, write_text

_SECONDS = 10.0  # between two parts
_STEPS = 64  # between two parts of several processes, whose clocks differ
_NAMES = ("keys", "scale")


class QueueParts:
    """The parts of one queue: each holds the rows that this process's devices encoded since the part before.

    Rows are only continued by the very steps that an undisturbed build takes, so that the queue is the same to the
    bit: parts of another manifest, batch or number of devices are thrown away with a note.

    Args:
      directory: a folder of their own, which `remove` takes away when the whole queue is written.
      manifest: what decides the queue's content, see `queue_files.manifest`.
      say: takes what the user should know: that a build goes on, or why it does not.
    """

    def __init__(self, directory: str | os.PathLike, manifest: dict[str, Any], say: Callable[[str], Any] = print):
        self._directory, self._content, self._say = pathlib.Path(directory), manifest, say
        self.center = manifest.get("center", "none")
        # Keys that are to be centred are not rounded before the last one is there.
        self._dtype = manifest["dtype"] if self.center == "none" else "float32"
        self._folder = self._directory / f"process-{jax.process_index()}"  # no file has two writers
        self._file = self._folder / "manifest.json"
        self._facts: dict[str, Any] = {}
        self._parts: list[dict[str, Any]] = []  # in order: {"stop": rows of a device, "steps", "sha256": {file: sum}}
        self._shards: list[int] = []
        self._plan: Steps
        self._saved = time.monotonic()

    def open(self, plan: Steps, sharding: Sharding) -> int:
        """Looks for the parts of an interrupted build; all processes call it.

        Args:
          plan: the steps of the build.
          sharding: of arrays [shards, held, ...].

        Returns:
          How many steps are done already.
        """
        self._plan, shards = plan, plan.shards
        places = sharding.addressable_devices_indices_map((shards, plan.held)).values()
        self._shards = sorted({place[0].indices(shards)[0] for place in places if place is not None})
        layout = {**plan.described(), "own": self._shards, "processes": jax.process_count()}
        self._facts = json.loads(json.dumps({**self._content, **layout}))
        self._parts = self._found()
        done = self._parts[-1]["steps"] if self._parts else 0
        if jax.process_count() > 1:  # one may have been killed before it wrote what another one did
            barrier(f"queue parts {self._directory.name}")
            done = int(multihost_utils.process_allgather(np.int64(done)).min())
            self._parts = [part for part in self._parts if part["steps"] <= done]
        if not self._parts:
            shutil.rmtree(self._folder, ignore_errors=True)
        else:
            count, name = self._content["count"], self._content["kind"]
            ready = min(count, plan.stop(done) * shards)
            self._say(f"queue {name}: continuing after {ready:,} of {count:,} keys")
        self._saved = time.monotonic()
        return done

    def _found(self) -> list[dict[str, Any]]:
        try:
            content = read_json(self._file, {"facts": dict, "parts": list})
            facts, parts = content["facts"], content["parts"]
            if facts != self._facts:
                different = sorted(k for k in facts.keys() | self._facts if facts.get(k) != self._facts.get(k))
                self._say(f"{self._directory} was begun with another {', '.join(different)}: building the queue anew")
                return []
            for part in parts:
                check_sums(self._folder, part["sha256"])
        except FileNotFoundError:
            return []
        except (Damaged, KeyError, TypeError, AttributeError):
            self._say(f"{self._directory} is damaged: building the queue anew")
            return []
        return parts

    def restore(self, sharding: Sharding) -> tuple[jax.Array, jax.Array | None]:
        """Returns (keys, scale) [shards, held, ...] with the rows that are done, zeros elsewhere; after `open`."""
        scaled = f"scale-{0:06d}.npy" in self._parts[0]["sha256"]
        return self._restored("keys", sharding), self._restored("scale", sharding) if scaled else None

    def _restored(self, name: str, sharding: Sharding) -> jax.Array:
        stored = [read_rows(self._folder / f"{name}-{number:06d}.npy") for number in range(len(self._parts))]
        dtype = np.dtype(jax.numpy.dtype(self._dtype)) if name == "keys" else stored[0].dtype
        shape = (self._plan.shards, self._plan.held, *stored[0].shape[2:])

        def block(index: Any) -> np.ndarray:
            (own,) = range(*index[0].indices(shape[0]))  # each device holds one
            out, start = np.zeros((1, *shape[1:]), dtype), 0
            for part in stored:
                rows = self._rows(own, start, start + part.shape[1])
                out[0, rows] = part[self._shards.index(own)].view(dtype)
                start += part.shape[1]
            return out

        return jax.make_array_from_callback(shape, sharding, block)

    def _rows(self, own: int, start: int, stop: int) -> Any:
        """The rows of one device that are encoded at these places of its order."""
        return slice(start, stop) if self._plan.order is None else self._plan.order[own, start:stop]

    def due(self, steps: int) -> bool:
        """Whether it is time for another part, after so many steps of the build."""
        if jax.process_count() > 1:
            return steps % _STEPS == 0
        return time.monotonic() - self._saved >= _SECONDS

    def save(self, arrays: tuple[jax.Array, jax.Array | None], steps: int) -> None:
        """Writes the rows since the last part, and then the note that they are there.

        Args:
          arrays: (keys, scale) [shards, held, ...].
          steps: of the build that are done: all of their rows have to be good keys.

        Raises:
          DiskFull: naming the folder.
        """
        start = self._parts[-1]["stop"] if self._parts else 0
        stop, sums = self._plan.stop(steps), {}
        with room_in(self._directory):
            self._folder.mkdir(parents=True, exist_ok=True)
            for name, array in zip(_NAMES, arrays, strict=True):
                if array is None:
                    continue
                file = self._folder / f"{name}-{len(self._parts):06d}.npy"
                blocks = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
                cut = [blocks[own][:, self._rows(own, start, stop)] for own in self._shards]
                np.save(file, np.concatenate([np.asarray(rows) for rows in cut]).view(stored_dtype(array.dtype)))
                flush(file)
                sums[file.name] = sha256(file)
        self._parts.append({"stop": stop, "steps": steps, "sha256": sums})
        write_text(self._file, json.dumps({"facts": self._facts, "parts": self._parts}, indent=1) + "\n")
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Takes the parts away: the whole queue is written."""
        if is_first():
            shutil.rmtree(self._directory, ignore_errors=True)
