"""`evaluate.load` on this folder loads the metric in `short_answer.py`."""
