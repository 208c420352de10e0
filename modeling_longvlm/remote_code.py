"""The code in a checkpoint's folder. With it, and `trust_remote_code=True`, it loads where longvlm is not installed.

The one place that knows which code is saved with a checkpoint: saving, comparing and removing it are all done here.
`save_pretrained` copies the file of a class and, recursively, the files that it imports relatively, all into the one
folder; so no two files of `modeling_longvlm` and `processing` may have the same name. It does so for classes that call
`register_for_auto_class`, which each class does at the end of its own file.
"""

import copy
import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.dynamic_module_utils import custom_object_save, get_relative_import_files

if TYPE_CHECKING:
    # Nothing else imports the pipeline. transformers finds imports by their text, so this line makes it travel.
    from .pipeline_longvlm import VideoQuestionAnsweringPipeline  # noqa: F401

PIPELINE_TASK = "video-question-answering"

# Where config.json says which class is in which file. The processor's files need nothing: transformers writes them.
CONFIG_ENTRIES: dict[str, dict[str, Any]] = {
    "auto_map": {
        "AutoConfig": "configuration_longvlm.LongVLMConfig",
        "AutoModel": "modeling_longvlm.LongVLMModel",
        "AutoModelForImageTextToText": "modeling_longvlm.LongVLMForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_longvlm.LongVLMForConditionalGeneration",
    },
    "custom_pipelines": {
        PIPELINE_TASK: {
            "impl": "pipeline_longvlm.VideoQuestionAnsweringPipeline",
            "pt": ["AutoModelForImageTextToText"],
            "type": "multimodal",
        }
    },
}


def is_remote(cls: type) -> bool:
    """Whether a class was loaded from a checkpoint's folder, not from the installed package."""
    return cls.__module__.startswith("transformers_modules")


@contextmanager
def code_named(model) -> Iterator[None]:
    """While a model is being saved: its configuration names the code, its class is one whose file can be copied."""
    config, cls = model.config, type(model)
    before = {key: getattr(config, key, None) for key in CONFIG_ENTRIES}
    for key, entry in CONFIG_ENTRIES.items():
        setattr(config, key, copy.deepcopy(entry))  # transformers adds to it
    # FSDP gives a sharded model a class of its own, defined in torch: its file is not the code.
    model.__class__ = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
    try:
        yield
    finally:
        model.__class__ = cls
        for key, entry in before.items():
            if entry is None:
                delattr(config, key)
            else:
                setattr(config, key, entry)


def save_code_and_config(model, folder: str | os.PathLike) -> None:
    """Writes the model's code and config.json as `save_pretrained` does, without weights: for one on the meta device.

    The caller sets `config.dtype`, if the weights have another dtype than the model.
    """
    with code_named(model):
        model.config.architectures = [type(model).__name__]
        custom_object_save(model, folder)
        model.config.save_pretrained(folder)


def remove_code(folder: str | os.PathLike) -> None:
    """Takes the code out of a checkpoint's folder; it then loads only with the package installed."""
    for file in Path(folder).glob("*.py"):
        file.unlink()
    for file in Path(folder).glob("*config.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        for part in (content, content.get("video_processor", {})):
            for key in CONFIG_ENTRIES:
                part.pop(key, None)
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def code_files(*classes: type) -> dict[str, Path]:
    """The files that `save_pretrained` of these classes copies: name in the folder -> file here."""
    files: dict[str, Path] = {}
    for cls in classes:
        own = inspect.getfile(cls)
        files |= {Path(file).name: Path(file) for file in (own, *get_relative_import_files(own))}
    return files
