"""How what comes with this project was made: longvlm-tiny, the ablations, the SmolLM2 run. Not in the wheel."""
