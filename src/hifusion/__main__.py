"""`python -m hifusion` is the program `hifusion`; torchrun starts it so."""

from hifusion.cli import main

if __name__ == "__main__":
    main()
