"""The command `longvlm`, one file a command. Installed as `longvlm_cli`: see `app.py`."""
