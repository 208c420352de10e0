"""`evaluate.load` on this folder gives the metric of `longvlm_qa.py`."""
