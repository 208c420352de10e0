"""Makes LongVLM checkpoints from parts and from checkpoints of other projects, and exports to the original format.

    from longvlm.conversion import convert_llava

The function `assemble` is imported from `longvlm.conversion.assemble`, since a package cannot have it and that module.
"""

from longvlm.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "llava": ("convert_llava",),
        "openclip_vision": ("convert_open_clip",),
        "original": ("ConversionReport", "convert_original"),
        "original_features": ("FeatureReport", "convert_features", "read_feature_file"),
        "to_original": ("convert_to_original",),
        "weights": ("Weights", "WeightsWriter"),
    },
)
