"""`python -m longvlm`: the same as the command `longvlm`."""

from longvlm_cli.app import main

if __name__ == "__main__":
    main()
