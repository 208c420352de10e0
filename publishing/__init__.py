"""Publishing a checkpoint on the Hub: its card, the checks, the upload."""
