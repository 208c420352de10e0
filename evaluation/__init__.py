"""Evaluation of LongVLM: the synthetic benchmark Storyline and the metric for short answers."""
