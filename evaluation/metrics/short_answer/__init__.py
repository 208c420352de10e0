"""`evaluate.load` on this folder gives the metric of `short_answer.py`."""
