"""Model cards: `hub_card.md`, filled in from the files of a checkpoint, and the checks that every card must pass.

Built on `huggingface_hub.ModelCard`, which parses the metadata. The Hub itself checks the rest (names of licences and
tags) before an upload begins.
"""

import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

import longvlm
from longvlm.files import parse_yaml, read_json, read_json_object
from longvlm.registration import LongVLMConfig

TAGS = ("longvlm", "video", "video-question-answering")
PIPELINE_TAG, LIBRARY = "video-text-to-text", "transformers"
MAX_FRAMES = 10**6  # of one video
NO_BASE_MODEL = "none"  # the user says that every part was trained from scratch

# Weights that must not be redistributed as they are: pattern of their names, and what they are.
RESTRICTED = {
    r"(^|[/_-])llama-?(1-)?(7|13|30|33|65)b": "LLaMA-1",
    r"vicuna-?(7|13|33)b-(delta-)?v(0|1\.[0-3])": "LLaMA-1 (Vicuna before 1.5)",
    r"alpaca|koala|wizardlm-?7b|video-?chatgpt|video-?llama-7b": "LLaMA-1",
    r"llava-lightning|llava-(7|13)b-(delta-)?v[01]": "LLaMA-1",
}


def template() -> str:
    """The text of `hub_card.md`, from the installed package or the checkout."""
    packaged = resources.files("longvlm") / "hub_card.md"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    return (Path(longvlm.__file__).resolve().parent.parent / "hub_card.md").read_text(encoding="utf-8")


def make_card(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None,
    base_model: Sequence[str] | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] = ("en",),
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    notice: str | None = None,
    usage: str | None = None,
    details: str | None = None,
) -> ModelCard:
    """Makes the model card of a checkpoint from what its files say.

    Args:
        folder: a checkpoint, as `save_pretrained` of model and processor wrote it.
        repo_id: its place on the Hub, for the usage examples.
        license: the Hub's name of the licence, such as `apache-2.0`; `other` with `license_name` and `license_link`.
        base_model: Hub ids of the models it was made from. Default: the Hub ids in its configuration. `["none"]`:
            there are none.
        datasets: Hub ids of the training data.
        language: codes of the languages it answers in.
        tags: further tags.
        results: measured results.
        notice: a paragraph below the introduction, in Markdown.
        usage: replaces the section on how to use the checkpoint, in Markdown.
        details: further sections, in Markdown, before the limits.

    Raises:
        ValueError: `folder` has no configuration of a LongVLM, or a result is incomplete.
    """
    folder = Path(folder)
    config = read_config(folder)
    vision, text = config.vision_config, config.text_config
    if base_model is None:
        base_model = [name for name in (text.name_or_path, vision.name_or_path) if is_hub_id(name)]
    named = [name for name in base_model if name != NO_BASE_MODEL]
    data = ModelCardData(
        language=list(language),
        license=license,
        license_name=license_name,
        license_link=license_link,
        library_name=LIBRARY,
        pipeline_tag=PIPELINE_TAG,
        base_model=named or None,
        datasets=list(datasets) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=[*TAGS, *tags],
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=list(results) or None,
    )
    num_frames = read_video_options(folder).get("num_frames") or 100
    schedule = config.merge_schedule
    return ModelCard.from_template(
        data,
        template_str=template(),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        num_parameters=count_parameters(folder),
        code_version=longvlm.__version__,
        vision_model=_describe(vision),
        language_model=_describe(text),
        num_frames=num_frames,
        num_global_tokens=config.num_global_tokens,
        num_video_tokens=config.num_video_tokens(num_frames),
        frames_per_segment=config.frames_per_segment,
        tokens_per_segment=config.tokens_per_segment,
        global_tokens=f"{config.num_global_tokens} ({config.global_placement})",
        vision_feature_layer=config.vision_feature_layer,
        merge_schedule=", ".join(map(str, schedule)) if schedule else "halve, then merge the remainder",
        merge_similarity=config.merge_similarity,
        merge_num_heads=config.merge_num_heads,
        merge_order=config.merge_order,
        projector_type=config.projector_type,
        untrained_parts=[_as_text(part).replace("_", " ") for part in getattr(config, "untrained_parts", None) or []],
        results=[{field: _as_text(value) for field, value in vars(result).items() if value} for result in results],
        notice=notice,
        usage=usage,
        details=details,
    )


def _as_text(value: Any) -> str:
    """What a file says, to be shown in Markdown: on one line, and not as markup."""
    return re.sub(r"([\\`<>|\[\]])", r"\\\1", " ".join(str(value).split()))


def complete_card(
    content: str,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: Sequence[str] | None = None,
    datasets: Sequence[str] = (),
    language: Sequence[str] | None = None,
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
    model_name: str | None = None,
) -> ModelCard:
    """Puts the given metadata into an existing card; its text is not changed.

    `datasets`, `language` and `results` replace those of the card, `tags` are added. Results are listed under the
    card's own model name, or `model_name` if it has none.

    Raises:
        ValueError: its metadata cannot be parsed.
    """
    check_metadata(content)
    card = ModelCard(content)
    data: Any = card.data  # its fields are those of ModelCardData
    for name, value in (("license", license), ("license_name", license_name), ("license_link", license_link)):
        if value is not None:
            setattr(data, name, value)
    if base_model is not None:
        data.base_model = [name for name in base_model if name != NO_BASE_MODEL] or None
    data.library_name, data.pipeline_tag = LIBRARY, PIPELINE_TAG
    data.tags = list(dict.fromkeys([*_as_list(data.tags), *TAGS, *tags]))
    if datasets:
        data.datasets = list(datasets)
    if language:
        data.language = list(language)
    if results:
        data.model_name = data.model_name or model_name
        data.eval_results = list(results)
        data.metrics = sorted({result.metric_type for result in results})
    return card


def check_metadata(content: str) -> None:
    """
    Raises:
        ValueError: the YAML at the start of a card is none, or too much for its parser.
    """
    block = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---\s*([\r\n]|$)", content, re.DOTALL)
    if block:
        parse_yaml(block[1], "README.md")


def check_card(content: str, *, without_base_model: bool = False) -> list[str]:
    """Checks the metadata of a card, and returns its problems, one line each.

    Args:
        content: the whole file.
        without_base_model: the user says that there is none.
    """
    try:
        check_metadata(content)
        data: Any = ModelCard(content).data
    except Exception as error:  # the YAML parser does not raise ValueError
        return [f"README.md: its metadata cannot be parsed: {' '.join(str(error).split())}"]
    problems = []
    if not data.license:
        problems.append("the card names no licence: give `license`, for example apache-2.0")
    elif not isinstance(data.license, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", data.license):
        problems.append(
            f"license {data.license!r} is not a licence name of the Hub, such as apache-2.0, mit or llama2"
        )
    elif data.license == "other" and not (data.license_name and data.license_link):
        problems.append("license other also needs `license_name` and `license_link`")
    if data.license_link and not re.fullmatch(r"https?://[^\s<>\"]+|[\w.-]+", str(data.license_link)):
        problems.append(f"license_link {data.license_link!r:.100} is neither a web address nor the name of a file")
    for field, values in (("license_name", _as_list(data.license_name)), ("tag", _as_list(data.tags))):
        problems += [
            f"{field} {value!r:.100} is not plain text on one line" for value in values if not _is_plain(str(value))
        ]
    base_model = _as_list(data.base_model)
    if not base_model and not without_base_model:
        problems.append(
            "the card names no base model: give `base_model` for the language model and for the vision encoder "
            f"(Hub ids), or `base_model` {NO_BASE_MODEL} if every part was trained from scratch"
        )
    for field, names in (("base_model", base_model), ("datasets", _as_list(data.datasets))):
        problems += [f"{field} {name!r} is not a Hub id such as me/name" for name in names if not _is_repo_id(name)]
    for code in _as_list(data.language):
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", str(code)):
            problems.append(f"language {code!r} is not a language code such as en, de or zh")
    for field, value in (("library_name", LIBRARY), ("pipeline_tag", PIPELINE_TAG)):
        if getattr(data, field) != value:
            problems.append(f"{field} must be {value}, the card says {getattr(data, field)!r}")
    return problems


def licence_warnings(card: ModelCard, config: Mapping[str, Any]) -> list[str]:
    """Parts that may not be redistributed, as far as names and sizes tell."""
    text = config.get("text_config", {})
    data: Any = card.data
    names = {*_as_list(data.base_model), str(text.get("_name_or_path", ""))}
    found = [(name, kin) for name in sorted(names) for rule, kin in RESTRICTED.items() if re.search(rule, name, re.I)]
    warnings = [
        f"{name} is {kin}: its weights are for research only and may not be redistributed; a delta to them may"
        for name, kin in found
    ]
    # True of the first generation of LLaMA, 7B to 65B, and of no later one: Llama 2 has a context of 4,096 tokens.
    is_first = text.get("model_type", "llama") == "llama" and 32000 <= text.get("vocab_size", 32000) < 32100
    is_first = is_first and text.get("max_position_embeddings", 2048) == 2048
    if not found and is_first and text.get("hidden_size", 4096) in (4096, 5120, 6656, 8192):
        warnings.append(
            "the language model has the shape of LLaMA-1 (or a Vicuna before 1.5): if it is one, its weights may "
            "not be redistributed"
        )
    return warnings


def read_results(path: str | Path) -> list[EvalResult]:
    """Measured results: a JSON list of objects with the fields of `huggingface_hub.EvalResult`.

    Raises:
        ValueError: another format, or a result without `task_type`, `dataset_type`, `dataset_name`, `metric_type` or
            `metric_value`.
    """
    try:
        values = read_json(path)
        if not isinstance(values, list):
            raise TypeError("it is not a list")
        results = [EvalResult(**value) for value in values]
        for result in results:
            if isinstance(result.metric_value, float) and not math.isfinite(result.metric_value):
                raise ValueError(f"{result.metric_type} is {result.metric_value}")
        return results
    except (TypeError, ValueError) as error:  # ValueError: also text that is not UTF-8 or JSON
        reason = str(error).replace("EvalResult.__init__() ", "")
        raise ValueError(
            f"{path} is not a list of results with the fields of huggingface_hub.EvalResult: {reason}"
        ) from None


def count_parameters(folder: Path) -> str:
    """The number of weights, such as "7.1 B", from the headers of the safetensors files."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # not a dict
                size = 1
                for side in tensors.get_slice(name).get_shape():
                    size *= side
                total += size
    for limit, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if total >= limit:
            return f"{total / limit:.3g}{unit}"
    return str(total)


def is_hub_id(name: str) -> bool:
    """Whether `name` looks like `owner/name` on the Hub and is not a local folder."""
    return name.count("/") == 1 and _is_repo_id(name) and not Path(name).exists()


def _is_repo_id(name) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _as_list(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [str(value)]


def _is_plain(text: str) -> bool:
    return text.isprintable() and len(text) <= 100 and not re.search(r"[<>\[\]`|{}]", text)


def read_config(folder: Path) -> LongVLMConfig:
    """The configuration in a checkpoint folder.

    Raises:
        ValueError: there is none, or it belongs to another model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a checkpoint, as save_pretrained wrote it")
    values = read_json_object(path)
    if values.get("model_type") != "longvlm":
        raise ValueError(f"{folder} contains a {values.get('model_type')} model, not a LongVLM")
    return LongVLMConfig.from_dict(values)


def read_video_options(folder: Path) -> dict[str, Any]:
    """The options of the video processor in a checkpoint folder.

    Raises:
        ValueError: there is no processor.
    """
    path = folder / "processor_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no processor_config.json: save the processor there as well")
    options = read_json_object(path).get("video_processor", {})
    if not isinstance(options, dict):
        raise ValueError(f'{path} is not that of a LongVLM: "video_processor" is no object')
    frames = options.get("num_frames")
    if frames is not None and not (isinstance(frames, int) and 1 <= frames <= MAX_FRAMES):
        raise ValueError(f"{path} has num_frames {frames!r:.60}; it can be 1 to {MAX_FRAMES:,}")
    return options


def _describe(config) -> str:
    shape = f"{config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}"
    name = config.name_or_path
    return f"[{name}](https://huggingface.co/{name}) ({shape})" if is_hub_id(name) else shape
