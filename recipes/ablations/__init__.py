"""The paper's claims at a small scale: how a video is condensed, compared with all else equal."""
