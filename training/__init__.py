"""Fine-tuning: forms of training data, labels, batches, what is trained, and the Trainer.

    from longvlm.training import LongVLMDataCollator, build_dataset

The function `train` is imported from `longvlm.training.train`, since a package cannot have it and that module.
"""

from longvlm.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "arguments": ("DataArguments", "ModelArguments", "TuningArguments", "parse_arguments"),
        "chat_encoding": ("EncodedChat", "encode_chat"),
        "collator": ("LongVLMDataCollator",),
        "data": ("DataReport", "VideoChatDataset", "build_dataset"),
        "formats": ("as_messages",),
        "trainer": ("LongVLMTrainer",),
        "tuning": ("load_projector", "prepare_model", "save_projector"),
    },
)
