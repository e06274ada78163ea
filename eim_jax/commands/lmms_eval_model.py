"""A finished run as a model of lmms-eval, which stays as it is: its tasks, its prompts, its scores.

Requests go through the server's own engine, so that a task is decoded in continuous batches.
"""

import io
import queue
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from PIL import Image

from eim_jax.commands.arriving_arms import served_arm
from eim_jax.commands.trained_arms import load_finished
from eim_jax.config import ConfigError, read_saved
from eim_jax.serving.chat_request import ChatRequest, Turn
from eim_jax.serving.conversation import asked, prompt_tokens
from eim_jax.serving.engine import Engine
from eim_jax.serving.job import Answered, Failed, Job, Piece, settings_of
from eim_jax.serving.pictures import crop

# Generation settings that tasks give and that decide nothing here.
_NEUTRAL = ("use_cache", "pad_token_id", "eos_token_id")
_KNOWN = ("max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", "until", *_NEUTRAL)


class FinishedRun(lmms):
    """An arm of a finished run.

    Args:
      workdir: the run's.
      arm: by default the last one.
      ignore_text: an arm that captions passes over a task's words; else they are refused.
      batch_size: texts decoded at once; by default the run's own.
      device: has to be left out: JAX takes what is there.
      max_batch_size: lmms-eval's; not read, as batches are of one size.
    """

    def __init__(
        self,
        workdir: str,
        arm: str = "",
        ignore_text: bool | str = False,
        batch_size: int | str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        folder = Path(workdir).expanduser()
        config = read_saved(folder)
        if config is None:
            raise ConfigError(f"{folder} holds no run (no run.json): give the workdir of a trained one")
        self.name = arm or config.arms[-1]
        if self.name not in config.arms:
            raise ConfigError(f"{folder}: no arm {self.name!r}; this run has {', '.join(config.arms)}")
        self._ignore = str(ignore_text).lower() == "true"
        if device is not None:
            raise ConfigError(f"device={device}: leave it out; JAX_PLATFORMS chooses what JAX runs on")
        if batch_size is not None and str(batch_size) != "1":  # 1 is lmms-eval's default, not a wish
            config = replace(config, decode=replace(config.decode, batch=int(batch_size)))
        self._inputs = load_finished(config, folder)
        self._engine = Engine({self.name: served_arm(self._inputs, self.name)}, max_waiting=1 << 30)
        self._arm = self._engine.arms[self.name]
        self._engine.start()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers a task's requests, in order.

        Args:
          requests: lmms-eval's instances (prompt, settings, doc_to_visual, doc_id, task, split).

        Raises:
          ValueError: a request cannot be answered by this run; the message names the task's document.
        """
        answers: list[queue.SimpleQueue[Any]] = []
        for request in requests:
            words, settings, visual_of, doc_id, task, split = request.args
            where = f"task {task}, document {doc_id}"
            pixels, ids = self._read(words, visual_of(self.task_dict[task][split][doc_id]), where)
            stops, chosen = self._settings(settings, where)
            answers.append(coming := queue.SimpleQueue())
            self._engine.submit(Job(self.name, pixels, ids, chosen, stops, False, coming.put))
        found = []
        for request, coming in zip(requests, answers, strict=True):
            found.append(_text(coming))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood in nats, and whether it is the greedy answer.

        Args:
          requests: lmms-eval's instances (prompt, doc_to_target, doc_to_visual, doc_id, task, split).
        """
        found = []
        for request in requests:
            words, target_of, visual_of, doc_id, task, split = request.args
            document, where = self.task_dict[task][split][doc_id], f"task {task}, document {doc_id}"
            text = target_of if isinstance(target_of, str) else target_of(document)
            pixels, ids = self._read(words, visual_of(document), where)
            prompt = self._prompt(words, pixels is not None, where)
            mean, count = self._engine.call(
                self.name, lambda arm, p=pixels, q=prompt, t=text: arm.likelihood(p, q, t.strip())
            )
            coming: queue.SimpleQueue[Any] = queue.SimpleQueue()
            _, greedy = self._settings({"temperature": 0}, where)
            self._engine.submit(Job(self.name, pixels, ids, greedy, (), False, coming.put))
            found.append((-mean * count, _text(coming) == text.strip()))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuses tasks of several rounds, whose next question depends on the answer before."""
        raise NotImplementedError("eim_jax answers tasks of one round: this task asks several")

    def _prompt(self, words: str, pictured: bool, where: str) -> str:
        turn = Turn("user", words, "given" if pictured else None, where)
        return asked(self._inputs.config.data, (turn,), ignore_text=self._ignore).prompt

    def _read(self, words: str, visuals: Sequence[Any] | None, where: str):
        visuals = [visual for visual in visuals or () if visual is not None]
        if len(visuals) > 1 or not all(isinstance(visual, Image.Image) for visual in visuals):
            kinds = ", ".join(type(visual).__name__ for visual in visuals)
            raise ValueError(f"{where}: {kinds}: a run looks at one picture, and at no video or sound")
        data, arm = self._inputs.config.data, self._arm
        prompt = self._prompt(words, bool(visuals), where)
        ids = prompt_tokens(data, prompt, bool(visuals), arm.tokenizer, arm.longest_prompt)
        if not visuals:
            return None, ids
        file = io.BytesIO()
        visuals[0].save(file, "PNG")  # so that modes and transparency are read as from a file
        return crop(file.getvalue(), where, arm.vlm.visual.config.image_size, self._inputs.fit), ids

    def _settings(self, given: Mapping[str, Any], where: str):
        unknown = [name for name in given if name not in _KNOWN]
        if unknown:
            raise ValueError(f"{where}: generation setting {unknown[0]!r} is not offered here")
        drawn = given.get("do_sample", bool(given.get("temperature")))
        beams = (given.get("num_beams") or 1) > 1
        if beams and given["num_beams"] != self._inputs.config.decode.beams:
            raise ValueError(
                f"{where}: num_beams={given['num_beams']}, but this run searches with "
                f"{self._inputs.config.decode.beams}: set num_beams to it by --gen_kwargs"
            )
        request = ChatRequest(
            model=self.name,
            turns=(),
            method="beam" if beams else None,
            temperature=None if beams else float(given.get("temperature") or 1.0) if drawn else 0.0,
            top_p=given.get("top_p") if drawn and not beams else None,
            max_tokens=given.get("max_new_tokens"),
        )
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(text for text in until if text)
        return stops, settings_of(request, self._inputs.config.decode, self._inputs.config.seed, self._arm.most)


def _text(coming: "queue.SimpleQueue[Any]") -> str:
    event: Any = coming.get()
    while isinstance(event, Piece):
        event = coming.get()
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, Answered)
    return event.text
