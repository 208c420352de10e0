"""`python -m longvlm_cli`: the command `longvlm`; unlike `python -m longvlm`, without importing the model first."""

from longvlm_cli.app import main

if __name__ == "__main__":
    main()
