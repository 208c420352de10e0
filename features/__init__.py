"""Features of many videos in a folder: how they are stored, and how they are extracted."""
