"""Metrics for `evaluate.load`: each lies in a folder of its own name and can be imported, too."""
