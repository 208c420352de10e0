"""What `longvlm ask` does: one video, any number of questions, answers as they come.

Built on `pipeline("video-question-answering")`, which decodes and encodes the video once for all questions.
"""

import json
import random
import time
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar, TextIO

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer
from transformers.utils import logging

from longvlm.loading import load_pipeline

# Answers that repeat one token this often come from a broken model, not from a video.
REPEATS = 16


def ask(
    video: str,
    questions: Iterable[str],
    model: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    video_options: dict[str, Any] | None = None,
    generation: dict[str, Any] | None = None,
    seed: int = 0,
    as_json: bool = False,
    stream: bool = False,
    quiet: bool = False,
    out: TextIO,
    err: TextIO,
) -> None:
    """Answers each question as it comes; answers go to `out`, progress and warnings to `err`.

    Raises:
        VideoDecodeError, ValueError, OSError: in one line each, what the user can change.
    """
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # retries, one by one
    logging.disable_progress_bar()
    pipe = load_pipeline(model, dtype=dtype, device=device)
    untrained = getattr(pipe.model.config, "untrained_parts", None)
    if untrained:
        parts = " and ".join(part.replace("_", " ") for part in untrained)
        print(f"longvlm: warning: untrained: {parts}. The answers say nothing about the video.", file=err)

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    asked = False
    for question in questions:
        asked = True
        guard, bars = _Guard(), _Bars(err, disable=quiet)
        options = dict(generation or {})
        if stream:
            options["streamer"] = _Streamer(pipe.processor.tokenizer, out)
        start = time.perf_counter()
        try:
            result = pipe(
                video=video,
                question=question,
                progress=bars,
                logits_processor=LogitsProcessorList([guard]),
                **(video_options or {}),
                **options,
            )
        finally:
            bars.close()
        seconds = time.perf_counter() - start
        if guard.repeats_itself():
            print("longvlm: warning: the answer is one token repeated; is the model trained?", file=err)
        if as_json:
            answer = {"video": video, "question": question, **result, "seconds": round(seconds, 3)}
            if bars.frames is not None:
                answer["frames"] = bars.frames
            if untrained:
                answer["untrained_parts"] = untrained
            print(json.dumps(answer, ensure_ascii=False), file=out, flush=True)
        elif not stream:
            print(result["answer"], file=out, flush=True)
    if not asked:
        raise ValueError("there is no question: none was given, or standard input was empty")


def show_warnings_in_one_line(err: TextIO) -> None:
    """Warnings about the video in one line; those of libraries about their own affairs not at all."""

    def show(message, category, filename, lineno, file=None, line=None):
        print(f"longvlm: warning: {' '.join(str(message).split())}", file=err)

    warnings.showwarning = show
    warnings.simplefilter("ignore")
    from longvlm.processing.video_sources import VideoDecodeWarning

    warnings.simplefilter("always", VideoDecodeWarning)


class _Bars:
    """Progress of decoding and encoding; `frames` is how many frames were taken, `None` if from the cache.

    A long video is decoded and encoded in turns, piece by piece: both bars stand until the end.
    """

    NAMES: ClassVar = {"decode": "decoding", "encode": "encoding"}

    def __init__(self, err: TextIO, *, disable: bool):
        self.err, self.disable = err, disable
        self.frames: int | None = None
        self.bars: dict[str, tqdm] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self.bars:
            self.bars[stage] = tqdm(
                total=total,
                desc=self.NAMES[stage],
                unit="frame",
                position=len(self.bars),
                file=self.err,
                disable=self.disable,
            )
        if stage == "encode":
            self.frames = total
        self.bars[stage].update(done - self.bars[stage].n)
        if done >= total and stage == "encode":  # else their clocks would run on while the answer is made
            self.close()

    def close(self) -> None:
        for bar in self.bars.values():
            bar.close()


class _Streamer(TextStreamer):
    """Writes the answer to `out` word by word."""

    def __init__(self, tokenizer, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(text, file=self.out, flush=True, end="\n" if stream_end else "")


class _Guard(LogitsProcessor):
    """Watches the generation: values that are not finite end it, and one token repeated is noticed."""

    def __init__(self):
        self.prompt: int | None = None
        self.answer: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
        # -inf stands for what must not be said; something has to be left, and nothing may be NaN.
        if torch.isnan(scores).any() or not torch.isfinite(scores).any():
            raise ValueError(
                f"the model gives values that are not numbers (NaN) in {str(scores.dtype).removeprefix('torch.')}; "
                "try --dtype float32, or another checkpoint"
            )
        self.answer = input_ids[0, self.prompt :]
        return scores

    def repeats_itself(self) -> bool:
        return self.answer is not None and len(self.answer) >= REPEATS - 1 and len(self.answer.unique()) == 1
