"""Publishing a checkpoint on the Hub: its model card, the checks, the upload.

    from longvlm.publishing import make_card

The function `publish` is imported from `longvlm.publishing.publish`, since a package cannot have it and that module.
"""

from longvlm.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "checks": ("code_problems", "loading_problems", "text_problems", "weight_problems"),
        "model_card": ("check_card", "complete_card", "make_card", "read_results"),
        "publish": ("NotReady", "Publication", "PublishError"),
    },
)
