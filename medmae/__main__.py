"""``python -m medmae``: the command line, for torchrun and for machines where scripts are not on the path."""

from medmae.cli import main

if __name__ == "__main__":
    main()
