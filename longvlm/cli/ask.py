"""`longvlm ask`: one video, any number of questions, answers as they come."""

import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, TextIO

import typer

from longvlm_cli.options import (
    Device,
    Dtype,
    Fps,
    MaxDownloadBytes,
    MaxDownloadSeconds,
    MaxFrames,
    Model,
    ModelDtype,
    NumFrames,
    Progress,
    Quiet,
    Video,
    VideoEnd,
    VideoStart,
    VideoStream,
    check_exists,
    load_engine,
    opened,
    video_options,
)

# An answer that repeats one token this often comes from a broken model, not from a video.
REPEATS = 16


def ask_command(
    video: Video,
    questions: Annotated[
        list[str], typer.Argument(metavar="QUESTION...", help="One or more; - reads them from stdin, one per line.")
    ],
    model: Model = None,
    num_frames: NumFrames = None,
    fps: Fps = None,
    max_frames: MaxFrames = None,
    video_start: VideoStart = None,
    video_end: VideoEnd = None,
    video_stream: VideoStream = None,
    max_download_bytes: MaxDownloadBytes = None,
    max_download_seconds: MaxDownloadSeconds = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest answer; above 0: sampled.")] = 0.0,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Nucleus sampling; needs --temperature above 0.")
    ] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Number of beams of a beam search.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    dtype: ModelDtype = Dtype.auto,
    device: Device = None,
    system: Annotated[str | None, typer.Option(help="System message, instead of the chat template's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per question, one per line.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print each answer while it is generated.")] = False,
    quiet: Quiet = False,
) -> None:
    """Ask questions about a video. The answers go to stdout."""
    if as_json and stream:
        raise ValueError("`as_json` and `stream` exclude each other; give one of them")
    options = video_options(
        num_frames=num_frames,
        fps=fps,
        max_frames=max_frames,
        video_start=video_start,
        video_end=video_end,
        video_stream=video_stream,
    )
    if stream and num_beams > 1:
        raise ValueError(f"`stream` cannot be combined with `num_beams` {num_beams}: a beam search decides at the end")
    if top_p is not None and temperature == 0:
        raise ValueError(f"`top_p` {top_p} needs `temperature` above 0")

    check_exists(video)
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    if temperature > 0:
        generation |= {"do_sample": True, "temperature": temperature, "top_p": 1.0 if top_p is None else top_p}
    engine = load_engine(model, quiet=quiet, dtype=dtype.value, device=device)
    engine.processor.video_processor.check_options(**options)
    untrained = getattr(engine.model.config, "untrained_parts", None)
    if untrained:
        parts = " and ".join(part.replace("_", " ") for part in untrained)
        print(f"longvlm: warning: untrained: {parts}. The answers say nothing about the video.", file=sys.stderr)
    _set_seed(seed)
    with opened(engine, video, max_download_bytes, max_download_seconds, quiet=quiet) as source:
        answers = answer_questions(
            engine,
            source,
            _read_questions(questions),
            video_options=options,
            system=system,
            generation=generation,
            stream_to=sys.stdout if stream else None,
            quiet=quiet,
        )
        for answer in answers:
            if as_json:
                answer = answer | {"video": video} | ({"untrained_parts": untrained} if untrained else {})
                print(json.dumps(answer, ensure_ascii=False))
            elif not stream:
                print(answer["answer"])
            sys.stdout.flush()


def answer_questions(
    engine,
    video,
    questions: Iterable[str],
    *,
    video_options: dict[str, Any],
    system: str | None,
    generation: dict[str, Any],
    stream_to: TextIO | None,
    quiet: bool,
) -> Iterator[dict[str, Any]]:
    """Yields each answer with what `--json` prints about it; `stream_to` gets the text while it is generated.

    `video` was opened before, so that questions share a download.

    Raises:
        VideoDecodeError, ValueError, OSError: one line about what the user can change.
    """
    from transformers import LogitsProcessorList

    asked = False
    for question in questions:
        asked = True
        guard, bars = _make_guard(), Progress(disable=quiet)
        messages: list[dict] = [{"role": "system", "content": system}] if system is not None else []
        content = [{"type": "video", "video": video, **video_options}, {"type": "text", "text": question}]
        messages.append({"role": "user", "content": content})
        options = {"progress": bars, "logits_processor": LogitsProcessorList([guard]), **generation}
        start = time.perf_counter()
        try:
            if stream_to is None:
                text = engine.generate(messages, **options)
            else:
                text = ""
                for bit in engine.stream(messages, **options):
                    print(bit, end="", file=stream_to, flush=True)
                    text += bit
                print(file=stream_to, flush=True)
        finally:
            bars.close()
        seconds = round(time.perf_counter() - start, 3)
        if guard.repeats_itself():
            print("longvlm: warning: the answer is one token repeated; is the model trained?", file=sys.stderr)
        answer = {"video": video.name, "question": question, "answer": text, "seconds": seconds}
        # The number is not known if the features came from the cache.
        yield answer | ({"frames": bars.totals["encode"]} if "encode" in bars.totals else {})
    if not asked:
        raise ValueError("there is no question: standard input was empty")


def _read_questions(questions: list[str]) -> Iterator[str]:
    """The questions; `-` stands for those on stdin, which are read one by one as they are typed."""
    for question in questions:
        if question != "-":
            yield question
            continue
        for line in sys.stdin:
            if line.strip():
                yield line.strip()


def _set_seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _make_guard():
    """Watches a generation: NaN ends it, and an answer that repeats one token is noticed."""
    import torch
    from transformers import LogitsProcessor

    class Guard(LogitsProcessor):
        def __init__(self):
            self.prompt: int | None = None
            self.answer: torch.Tensor | None = None

        def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
            if self.prompt is None:
                self.prompt = input_ids.shape[1]
            # -inf marks tokens that must not be generated; at least one must remain, and none may be NaN.
            if torch.isnan(scores).any() or not torch.isfinite(scores).any():
                dtype = str(scores.dtype).removeprefix("torch.")
                raise ValueError(f"the model computes NaN in {dtype}; try `dtype` float32, or another checkpoint")
            self.answer = input_ids[0, self.prompt :]
            return scores

        def repeats_itself(self) -> bool:
            return self.answer is not None and len(self.answer) >= REPEATS - 1 and len(self.answer.unique()) == 1

    return Guard()
