"""The engine: a model, its processor and a cache of video features. Chat messages in, answers out.

    engine = LongVLMEngine(model, processor)        # or longvlm.load(folder)
    engine.generate([{"role": "user", "content": [{"type": "video", "video": "film.mp4"},
                                                  {"type": "text", "text": "Who opens the door?"}]}])

Whoever asks a model does it through the engine: the pipeline, the command line, evaluation, a server. Nothing else
encodes videos for questions, counts their tokens, builds prompts, runs the LLM and decodes its answers.
Note: a video is encoded before the prompt is built, since its features say how many tokens it takes there.
"""

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from .feature_cache_longvlm import VideoFeatureCache, describe_options, video_key
from .plain_numbers import plain_generation_options

DEFAULT_MAX_NEW_TOKENS = 256

Progress = Callable[[str, int, int], None]


@dataclass
class Answer:
    """
    One answer in detail.

    Args:
        text (`str`): the answer, without special tokens and surrounding white space.
        token_ids (`list[int]`): the generated tokens, including the end token.
        logprobs (`list[float]`): the log-probability of each of them under the model, before temperature and other
            processing.
        finish_reason (`str`): `"stop"`: ended by the model or a stop string; `"length"`: the longest answer allowed;
            `"cancelled"`: `should_stop` said so.
        prompt_tokens (`int`): tokens in the prompt, including those of its videos.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int


class LongVLMEngine:
    """
    Args:
        model: a `LongVLMForConditionalGeneration`.
        processor: its `LongVLMProcessor`.
        cache_bytes (`int`, defaults to 256 MiB): limit on the features that are kept for further questions; 0 keeps
            nothing. `engine.cache.clear()` drops them.

    Threads may share an engine. It does not batch their calls: each runs the model on its own.
    """

    def __init__(self, model, processor, *, cache_bytes: int = 256 << 20):
        self.model = model
        self.processor = processor
        self.cache = VideoFeatureCache(cache_bytes)
        # Tokenizers keep padding and truncation as state: two threads at once fail with "Already borrowed".
        self._tokenizer_lock = threading.Lock()
        self._stop_tokenizer_copy = None

    @property
    def _stop_tokenizer(self):
        """A tokenizer for `generate()` to encode stop strings with: it does so outside our lock."""
        with self._tokenizer_lock:
            if self._stop_tokenizer_copy is None:
                self._stop_tokenizer_copy = copy.deepcopy(self.processor.tokenizer)
            return self._stop_tokenizer_copy

    # --- videos ---

    def encode(self, video, *, progress: Progress | None = None, **video_options):
        """
        The features of one video: from the cache, or else decoded and encoded piece by piece, in constant memory.

        Args:
            video: anything the video processor takes (a path, URL, bytes, a folder of images, frames), or
                features, which are returned unchanged.
            progress: called as `progress(stage, done, total)`, in frames, with the stages `"decode"` and `"encode"`;
                not called if the features are in the cache or another thread is encoding the video. Before that, a URL
                or a pipe has the stage `"download"`, in bytes; its total is 0 if it is unknown.
            video_options: of the video processor: `num_frames`, `fps`, `max_frames`, `video_start`, `video_end`...

        Returns:
            [`LongVLMVideoFeatures`] of one video, which messages accept as `"video"`.

        Raises:
            VideoDecodeError: the video cannot be read.
            ValueError: features were given that this model cannot use, or with video options.
        """
        return self._features_of(video, video_options, progress)

    def _features_of(self, video, video_options: dict, progress: Progress | None, check: Callable | None = None):
        """As `encode`. `check` is called while another thread encodes the video, and may raise."""
        if _are_features(video):
            if video_options:
                raise ValueError(f"{', '.join(video_options)} cannot be applied to features: give the video itself")
            return self.model.base_model.as_video_features(video)
        video = self.processor.video_processor.encoded_video(video)
        settings = describe_options(video_options), self.processor.video_processor.to_json_string(), self._method()
        if not _is_known_by_content(video):
            key = video_key(video, *settings)
            return self.cache.get_or_make(key, lambda: self._encode(video, video_options, progress), check)
        # Its content is the key: the same address may hold another video tomorrow, and bytes may have any name.
        with self.processor.video_processor.open_video(video, progress=progress) as source:
            key = video_key(source.path or source.digest(), *settings)
            return self.cache.get_or_make(key, lambda: self._encode(source, video_options, progress), check)

    @torch.no_grad()  # here, not in the callers: a graph of every frame would fill the memory
    def _encode(self, video, video_options: dict, progress: Progress | None):
        model, total, encoded = self.model.base_model, 0, 0

        def on_decoded(stage: str, done: int, all_frames: int) -> None:
            nonlocal total
            total = all_frames
            if progress is not None:
                progress(stage, done, all_frames)

        state = None
        pieces = self.processor.video_processor.iter_pieces(video, progress=on_decoded, **video_options)
        for piece in pieces:
            if state is None:
                state = model.start_video(model.config.segment_length(total))
            state.duration = piece.duration
            for start in range(0, len(piece.pixel_values), model.config.vision_chunk_frames):
                chunk = slice(start, start + model.config.vision_chunk_frames)
                frames = piece.pixel_values[chunk]
                state.append(frames, piece.timestamps and piece.timestamps[chunk])
                encoded += len(frames)
                if progress is not None:
                    progress("encode", encoded, max(total, encoded))
        return state.features().detach()

    def _method(self) -> str:
        """All settings of the model that its features depend on."""
        config = self.model.config.to_dict()
        config.pop("text_config", None)
        return f"{self.model.dtype} {sorted(config.items(), key=lambda item: item[0])}"

    # --- answers ---

    def generate(
        self,
        messages: Sequence,
        *,
        max_new_tokens: int | None = None,
        return_details: bool = False,
        return_full_text: bool = False,
        should_stop: Callable[[], bool] | None = None,
        progress: Progress | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **generate_kwargs,
    ):
        """
        Answers one conversation, or a batch of them.

        Args:
            messages: a conversation, `[{"role": ..., "content": ...}, ...]`, with any number of turns and videos; or a
                list of conversations, which go through the LLM together. Content is text or a list of parts,
                `{"type": "text", "text": ...}` and `{"type": "video", "video": ...}`; a video part may hold options of
                the video processor (`"num_frames": 50`). If the last message is the assistant's, the model continues
                it.
            max_new_tokens (`int`, *optional*): tokens in the longest answer; default: as in the model's generation
                configuration, else 256.
            return_details (`bool`): return [`Answer`] instead of text.
            return_full_text (`bool`): put the prompt before the answer.
            should_stop: called before each chunk of video and each token; if it returns True, the answer ends there.
            progress: as in `encode`.
            chat_template (`str`, *optional*): another chat template, or the name of a built-in one.
            chat_template_kwargs (`dict`, *optional*): variables of the chat template.
            generate_kwargs: of `model.generate()`: `do_sample`, `temperature`, `num_beams`, `stop_strings`...

        Returns:
            The answer, `str` or [`Answer`]; for a batch, a list of them. With `num_return_sequences` above 1, each
            answer is a list.

        Raises:
            ValueError: the messages do not have this form, ask nothing, or do not fit into the LLM's context with
                their videos and `max_new_tokens`.
            VideoDecodeError: a video cannot be read.
        """
        conversations, is_batch = _as_conversations(messages, self.processor)
        if max_new_tokens is not None:
            generate_kwargs["max_new_tokens"] = max_new_tokens
        options = self._with_defaults(plain_generation_options(generate_kwargs))
        template = chat_template, chat_template_kwargs
        try:
            prompt = self._prepare(conversations, options, progress, should_stop, template)
        except _Stopped:
            each = self._setting(options, "num_return_sequences") or 1
            answers = [[Answer("", [], [], "cancelled", 0) for _ in range(each)] for _ in conversations]
        else:
            answers = self._answer(prompt, should_stop, options, return_details, return_full_text)
        results: list[Any] = [several if return_details else [one.text for one in several] for several in answers]
        results = [several[0] if len(several) == 1 else several for several in results]
        return results if is_batch else results[0]

    def stream(self, messages: Sequence, **options) -> Iterator[str]:
        """
        Answers one conversation bit by bit; joined, the bits are the text that `generate` returns.

        The model runs in its own thread. Closing or dropping the iterator stops it, even while the video is being
        encoded.

        Args:
            messages: one conversation, as in `generate`.
            options: as in `generate`, except for beams and several answers.

        Raises:
            ValueError: several conversations, answers or beams.
        """
        conversations, is_batch = _as_conversations(messages, self.processor)
        if is_batch:
            raise ValueError(f"stream answers one conversation at a time, got {len(conversations)}: call it for each")
        options = plain_generation_options(options)
        if (options.get("num_beams") or 1) > 1 or (options.get("num_return_sequences") or 1) > 1:
            raise ValueError("stream gives one answer, without beams: leave out num_beams and num_return_sequences")
        return self._stream(conversations[0], options)

    def _stream(self, messages: list[dict], options: dict) -> Iterator[str]:
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        closed, failure = threading.Event(), []
        asked_to_stop = options.pop("should_stop", None)

        def run() -> None:
            try:
                self.generate(
                    messages,
                    streamer=streamer,
                    should_stop=lambda: closed.is_set() or (asked_to_stop is not None and asked_to_stop()),
                    **options,
                )
            except BaseException as error:
                failure.append(error)
            finally:
                streamer.text_queue.put(streamer.stop_signal)  # even if generation never began

        thread = threading.Thread(target=run, name="longvlm-stream", daemon=True)
        thread.start()
        try:
            started, space = False, ""
            for text in streamer:
                # No white space around the answer, as in `generate`; within it, it is sent with the next word.
                text = space + text if started else text.lstrip()
                word = text.rstrip()
                space = text[len(word) :]
                if word:
                    started = True
                    yield word
        finally:
            closed.set()
            thread.join()
        if failure:
            raise failure[0]

    @torch.no_grad()
    def score_choices(
        self,
        messages: Sequence[Mapping],
        choices: Sequence[str],
        *,
        progress: Progress | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """
        How likely each choice is as the assistant's answer: the sum of the log-probabilities of its tokens, including
        the end of the turn.

        A choice's tokens are those after the generation prompt when the conversation with this answer is rendered and
        tokenized as a whole. What all choices share, above all the video, goes through the LLM once.

        Args:
            messages: a conversation that needs an answer.
            choices: the answers to compare.
            progress, chat_template, chat_template_kwargs: as in `generate`.

        Returns:
            Log-likelihoods (natural logarithm), one for each choice.

        Raises:
            ValueError: there are no choices, one is not text, the conversation already ends with an answer, or it does
                not fit into the LLM's context with its videos and a choice.
        """
        conversations, is_batch = _as_conversations(messages, self.processor)
        if is_batch:
            raise ValueError(f"score_choices takes one conversation, got {len(conversations)}: call it for each")
        messages = conversations[0]
        choices = list(choices)
        if not choices or not all(isinstance(choice, str) and choice.strip() for choice in choices):
            raise ValueError(f"choices must be non-empty strings, got {choices!r:.200}")
        if messages[-1]["role"] == "assistant":
            raise ValueError("the conversation ends with an answer: leave out the assistant's last message")
        answered: list[list] = [[*messages, {"role": "assistant", "content": choice}] for choice in choices]
        template = chat_template, chat_template_kwargs
        messages, videos = self._take_videos(messages)
        text = self._num_text_tokens(self._render(messages, template), len(videos))
        features = self._features_of_all(videos, text, None, progress, None)
        answered = [self._take_videos(one)[0] for one in answered]
        prompt_ids = self._token_ids(messages, features, template)
        choice_ids = [self._token_ids(one, features, template) for one in answered]
        for ids in choice_ids:
            self._check_fits(len(ids), 0, None)

        starts = [max(_common_length(prompt_ids, ids), 1) for ids in choice_ids]
        ends = [self._end_of_turn(ids, start) for ids, start in zip(choice_ids, starts, strict=True)]
        for choice, start, end in zip(choices, starts, ends, strict=True):
            if start == end:
                raise ValueError(f"the chat template drops the choice {choice!r:.80}: use another chat_template")
        shared = min(starts)
        if self._num_placeholders(prompt_ids[:shared]) == self._num_placeholders(prompt_ids):
            prefill = self._prefill(prompt_ids[:shared], features)
            continuations = (
                self._continue(prefill, ids[shared:end]) for ids, end in zip(choice_ids, ends, strict=True)
            )
        else:  # the template writes part of the answer before the video
            whole = (self._prefill(ids[:end], features, keep=end) for ids, end in zip(choice_ids, ends, strict=True))
            shared, continuations = 1, (logits[0] for logits, _, _ in whole)
        scores = []
        for logits, ids, start, end in zip(continuations, choice_ids, starts, ends, strict=True):
            # logits[i] predict token shared + i.
            targets = torch.tensor(ids[start:end], device=logits.device)
            logprobs = logits[start - shared : end - shared].float().log_softmax(-1)
            scores.append(logprobs.gather(-1, targets[:, None]).sum().item())
        return scores

    # --- from messages to the model's input ---

    def _take_videos(self, messages) -> tuple[list[dict], list]:
        """-> the conversation with empty video parts, and its videos with their options."""
        messages, videos = self.processor.take_videos(messages)
        for part in videos:
            if part.video is None:
                raise ValueError('a video part comes without a video: write {"type": "video", "video": ...}')
        if messages[-1]["role"] == "user" and _is_blank(messages[-1].get("content")):
            raise ValueError("the question is empty: the last message needs text that asks something")
        return messages, videos

    def _features_of_all(self, videos: Sequence, text_tokens: int, options: Mapping | None, progress, should_stop):
        """The features of all videos of a conversation (`None`: it has none), encoded while the LLM has room for them.

        Args:
            text_tokens: tokens in the rest of the prompt.
            options: of the generation; `None`: nothing is generated.
        """
        features: list[Any] = []
        check = None if should_stop is None else partial(_raise_if, should_stop)
        self._check_fits(text_tokens, 0, options)
        config, taken = self.model.config, 0
        for part in videos:
            # Before the first frame is encoded it is known how many there will be.
            room = partial(self._check_room, text_tokens, taken, options)
            report = _stoppable(_checking(progress, room), should_stop)
            features.append(self._features_of(part.video, part.options, report, check))
            taken += sum(features[-1].num_tokens(config))
            self._check_fits(text_tokens, taken, options)
        return type(features[0]).cat(features) if features else None

    def _check_room(self, text_tokens: int, video_tokens: int, options: Mapping | None, num_frames: int) -> None:
        """As `_check_fits`, with one more video of `num_frames` frames."""
        self._check_fits(text_tokens, video_tokens + self.model.config.num_video_tokens(num_frames), options)

    def _check_fits(self, text_tokens: int, video_tokens: int, options: Mapping | None) -> None:
        """
        Raises:
            ValueError: prompt and answer are longer than the LLM's context.
        """
        limit, prompt = self.model.config.context_length, text_tokens + video_tokens
        answer = 0 if options is None else self._longest_answer(prompt, options)
        if limit is None or prompt + answer <= limit:
            return
        parts, remedies = [f"the prompt has {prompt:,} tokens"], ["shorten the text"]
        if video_tokens:
            parts.append(f"{video_tokens:,} of them for videos")
            remedies.append("take fewer frames")
        if answer:
            parts.append(f"its answer up to {answer:,}")
            remedies += ["lower `max_new_tokens`"] if prompt < limit else []
        raise ValueError(f"{', '.join(parts)}, but the language model takes {limit:,} in all: {' or '.join(remedies)}")

    def _longest_answer(self, prompt_tokens: int, options: Mapping) -> int:
        """The number of tokens after which a generation with these options ends."""
        new_tokens = self._setting(options, "max_new_tokens")
        if new_tokens is None:  # `max_length` includes the prompt
            new_tokens = max((self._setting(options, "max_length") or 0) - prompt_tokens, 0)
        return new_tokens

    def _prepare(self, conversations, options: Mapping, progress, should_stop, template) -> dict[str, Any]:
        taken = [self._take_videos(messages) for messages in conversations]
        texts = [self._render(messages, template) for messages, _ in taken]
        lengths = [self._num_text_tokens(text, len(videos)) for text, (_, videos) in zip(texts, taken, strict=True)]
        for length in lengths:  # of all, before the first video is encoded
            self._check_fits(length, 0, options)
        encoded = [
            self._features_of_all(videos, length, options, progress, should_stop)
            for (_, videos), length in zip(taken, lengths, strict=True)
        ]
        with_video = [features for features in encoded if features is not None]
        features = type(with_video[0]).cat(with_video) if with_video else None
        counts = [] if features is None else features.num_tokens(self.model.config)
        with self._tokenizer_lock:
            inputs = self.processor(
                text=texts, video_token_counts=counts, padding=True, padding_side="left", return_tensors="pt"
            ).to(self.model.device)
        return {**inputs} if features is None else {**inputs, "video_features": features}

    def _num_text_tokens(self, text: str, num_videos: int) -> int:
        """How many tokens a prompt has without those of its videos."""
        with self._tokenizer_lock:
            ids = self.processor(text=[text], video_token_counts=[1] * num_videos)["input_ids"][0]
        return len(ids) - num_videos

    def _render(self, messages, template) -> str:
        chat_template, variables = template
        continues = messages[-1]["role"] == "assistant"
        options = {} if chat_template is None else {"chat_template": chat_template}
        return self.processor.apply_chat_template(
            messages,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            tokenize=False,
            **options,
            **(variables or {}),
        )

    # --- generation ---

    def _answer(self, prompt: dict, should_stop, options: dict, with_logprobs: bool, full_text: bool):
        """The `Answer`s of each conversation, in order."""
        options = dict(options)
        stopping = _StopWhenAsked(should_stop)
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or []), stopping])
        if self._setting(options, "stop_strings") is not None:
            options.setdefault("tokenizer", self._stop_tokenizer)
        options |= {"return_dict_in_generate": True, "output_logits": with_logprobs}
        generated = self.model.generate(**prompt, **options)
        width = prompt["input_ids"].shape[1]
        answers = generated.sequences[:, width:]  # (conversations * returned sequences, steps)
        logprobs: Tensor | None = None
        if with_logprobs and answers.shape[1]:
            logits = tuple(step.float() for step in generated.logits)
            beams = getattr(generated, "beam_indices", None)
            logprobs = self.model.compute_transition_scores(generated.sequences, logits, beams, normalize_logits=True)
        each = len(answers) // len(prompt["input_ids"])  # num_return_sequences
        result: list[list[Answer]] = [[] for _ in prompt["input_ids"]]
        for i, ids in enumerate(answers.tolist()):
            conversation = i // each
            is_token = prompt["attention_mask"][conversation].bool()
            prompt_ids = prompt["input_ids"][conversation][is_token].tolist()
            ids, text, reason = self._read_answer(ids, stopping.stopped, options)
            if full_text:
                text = self.processor.tokenizer.decode(prompt_ids + ids, skip_special_tokens=True).strip()
            scores = [] if logprobs is None else logprobs[i, : len(ids)].tolist()
            result[conversation].append(Answer(text, ids, scores, reason, len(prompt_ids)))
        return result

    def _with_defaults(self, options: dict) -> dict[str, Any]:
        options, given = dict(options), options.get("generation_config")
        lengths = [options.get(name) for name in ("max_new_tokens", "max_length")]
        lengths.append(getattr(given, "max_length", None))
        if self._setting(options, "max_new_tokens") is None and not any(lengths):
            options["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        if self._setting(options, "pad_token_id") is None:
            options["pad_token_id"] = self.processor.tokenizer.pad_token_id
        if "stop_strings" in options:
            options["stop_strings"] = _as_stop_strings(options["stop_strings"])
        return options

    def _setting(self, options: Mapping, name: str):
        """A setting of the generation: from the call, the `generation_config` of the call, or that of the model."""
        for place in (options.get("generation_config"), self.model.generation_config):
            if options.get(name) is None and getattr(place, name, None) is not None:
                return getattr(place, name)
        return options.get(name)

    def _read_answer(self, ids: list[int], cancelled: bool, options: Mapping) -> tuple[list[int], str, str]:
        """One generated sequence, padding included -> token ids, text, finish reason."""
        ends, pad = self._end_token_ids(options), self._pad_token_id(options)
        end = next((i for i, token in enumerate(ids) if token in ends), None)
        # After its end, a sequence is padded while others in the batch go on.
        padded = end is not None or ids[-1:] == [pad]
        ids = ids[: end + 1] if end is not None else ids[: len(ids) - _count_trailing(ids, pad)]
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        stop_strings = self._setting(options, "stop_strings") or ()
        stop_strings = (stop_strings,) if isinstance(stop_strings, str) else stop_strings
        raw = self.processor.tokenizer.decode(ids, skip_special_tokens=False)  # a stop string may be a special token
        at_string = any(string in raw for string in stop_strings)
        if at_string and end is not None and ids[-1] == pad:
            ids = ids[:-1]  # this end token was padding
        reason = "stop" if padded or at_string else "cancelled" if cancelled else "length"
        return ids, text.strip(), reason

    def _end_token_ids(self, options: Mapping) -> set[int]:
        ends = self._setting(options, "eos_token_id")
        ends = [] if ends is None else ends.tolist() if isinstance(ends, Tensor) else ends
        return {ends} if isinstance(ends, int) else set(ends)

    def _pad_token_id(self, options: Mapping) -> int | None:
        pad = self._setting(options, "pad_token_id")
        return pad if pad is not None else self.processor.tokenizer.pad_token_id

    # --- choices ---

    def _token_ids(self, messages, features, template) -> list[int]:
        """The conversation's token ids, with the generation prompt if the assistant does not have the last word."""
        chat_template, variables = template
        text = self.processor.apply_chat_template(
            messages,
            add_generation_prompt=messages[-1]["role"] != "assistant",
            tokenize=False,
            **({} if chat_template is None else {"chat_template": chat_template}),
            **(variables or {}),
        )
        counts = [] if features is None else features.num_tokens(self.model.config)
        with self._tokenizer_lock:
            return list(self.processor(text=[text], video_token_counts=counts)["input_ids"][0])

    def _end_of_turn(self, ids: list[int], start: int) -> int:
        """Where the answer that begins at `start` ends, including its end token."""
        tokenizer = self.processor.tokenizer
        ends = self._end_token_ids({}) | ({tokenizer.eos_token_id} - {None})
        specials = set(tokenizer.all_special_ids)
        for tokens in (ends, specials):
            found = [i for i in range(start, len(ids)) if ids[i] in tokens]
            if found:
                # The first end token ends the turn; other special tokens may also open it.
                return (found[0] if tokens is ends else found[-1]) + 1
        return len(ids)

    def _num_placeholders(self, ids: Sequence[int]) -> int:
        return list(ids).count(self.model.config.video_token_id)

    def _prefill(self, ids: list[int], features, keep: int = 1) -> tuple[Tensor, str, Any]:
        """-> logits `(1, keep, vocabulary)` of the last `keep` tokens, the cache's name in this version, the cache."""
        videos = {} if features is None else {"video_features": features}
        input_ids = torch.tensor([ids], device=self.model.device)
        outputs = self.model(input_ids=input_ids, use_cache=True, logits_to_keep=keep, return_dict=True, **videos)
        name = "cache" if "cache" in outputs else "past_key_values"
        return outputs.logits, name, outputs[name]

    def _continue(self, prefill: tuple[Tensor, str, Any], ids: list[int]) -> Tensor:
        """Logits `(len(ids), vocabulary)` that predict `ids` after the prefill; its cache stays as it was."""
        logits, name, cache = prefill
        if len(ids) > 1:
            # A copy for each choice: not every kind of cache layer can be cropped.
            input_ids = torch.tensor([ids[:-1]], device=self.model.device)
            outputs = self.model(input_ids=input_ids, use_cache=True, return_dict=True, **{name: copy.deepcopy(cache)})
            logits = torch.cat([logits, outputs.logits.to(logits.device)], dim=1)
        return logits[0]

    def __getstate__(self) -> dict:
        left_out = ("_tokenizer_lock", "_stop_tokenizer_copy")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._tokenizer_lock, self._stop_tokenizer_copy = threading.Lock(), None


class _Stopped(Exception):
    """Ends the encoding of a video that nobody waits for."""


class _StopWhenAsked(StoppingCriteria):
    """Ends a generation once `should_stop()` returns True."""

    def __init__(self, should_stop: Callable[[], bool] | None):
        self.should_stop, self.stopped = should_stop, False

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.stopped = self.stopped or (self.should_stop is not None and self.should_stop())
        return torch.full((len(input_ids),), self.stopped, dtype=torch.bool, device=input_ids.device)


def _raise_if(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise _Stopped


def _stoppable(progress: Progress | None, should_stop: Callable[[], bool] | None) -> Progress | None:
    if should_stop is None:
        return progress

    def report(stage: str, done: int, total: int) -> None:
        _raise_if(should_stop)
        if progress is not None:
            progress(stage, done, total)

    return report


def _is_known_by_content(video) -> bool:
    """An address, a pipe, or a video that was opened before."""
    if isinstance(video, (str, os.PathLike)):
        path = os.fsdecode(video)
        return "://" in path[:16] or (os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path))
    return hasattr(video, "digest")


def _checking(progress: Progress | None, check_frames: Callable[[int], None]) -> Progress:
    """Calls `check_frames` with a video's number of frames, which may raise, before they are encoded."""
    checked = False

    def report(stage: str, done: int, total: int) -> None:
        nonlocal checked
        if not checked and total and stage == "decode":
            check_frames(total)
            checked = True
        if progress is not None:
            progress(stage, done, total)

    return report


def _as_stop_strings(strings) -> list[str] | None:
    listed = strings if isinstance(strings, (list, tuple)) else [] if strings is None else [strings]
    if not all(isinstance(string, str) and string for string in listed):
        raise ValueError(f"stop_strings must be text, or a list of texts that are not empty, got {strings!r:.80}")
    return list(listed) or None


def _is_blank(content) -> bool:
    """Whether a message's content, text or a list of parts, has nothing to read: white space, zero-width marks."""
    parts = [content] if isinstance(content, str) else content or ()
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    return not any(char.isprintable() and not char.isspace() for text in texts for char in text)


def _are_features(video) -> bool:
    return isinstance(video, Mapping) and "local_features" in video


def _as_conversations(messages, processor) -> tuple[list[list[dict]], bool]:
    """-> conversations, and whether a list of them was given. The processor checks the messages' content."""
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"messages must be a list of messages, or a list of such lists, got {messages!r:.80}")
    first = messages[0]
    is_batch = not hasattr(first, "role") and (isinstance(first, (list, tuple)) or hasattr(first, "messages"))
    conversations = [getattr(one, "messages", one) for one in messages] if is_batch else [messages]
    for one in conversations:
        if not isinstance(one, (list, tuple)) or not one:
            raise ValueError(f'a conversation must be a list of {{"role": ..., "content": ...}}, got {one!r:.80}')
    return [processor.plain_messages(one) for one in conversations], is_batch


def _count_trailing(ids: Sequence[int], value: int | None) -> int:
    return next((i for i, token in enumerate(reversed(ids)) if token != value), len(ids))


def _common_length(one: Iterable[int], other: Iterable[int]) -> int:
    """The length of the common beginning of two sequences."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


__all__ = ["Answer", "LongVLMEngine"]
