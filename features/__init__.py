"""Features of many videos: extracted once, stored in shards, read in any order.

from longvlm.features import FeatureReader, extract_features
"""

from longvlm.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "extract": ("ExtractionReport", "extract_features"),
        "failures": ("read_failed",),
        "fingerprint": ("check_features", "feature_metadata"),
        "store": ("FeatureReader", "FeatureWriter", "StoredFeatures"),
        "videos": ("VIDEO_SUFFIXES", "find_videos", "window_name"),
    },
)
