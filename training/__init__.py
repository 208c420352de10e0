"""Fine-tuning: forms of training data, labels, batches, what is trained, and the Trainer.

    from longvlm.training import LongVLMDataCollator, build_dataset

The function `train` is imported from `longvlm.training.train`, since a package cannot have it and that module.
"""

from importlib import import_module
from typing import Any

_FILES = {
    "arguments": ("DataArguments", "ModelArguments", "TuningArguments", "parse_arguments"),
    "chat_encoding": ("EncodedChat", "encode_chat"),
    "collator": ("LongVLMDataCollator",),
    "data": ("DataReport", "VideoChatDataset", "build_dataset"),
    "formats": ("as_messages",),
    "trainer": ("LongVLMTrainer",),
    "tuning": ("load_projector", "prepare_model", "save_projector"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
