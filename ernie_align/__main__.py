"""Run the command line: `python -m ernie_align`, and `accelerate launch -m ernie_align`."""

from ernie_align.cli import main

if __name__ == "__main__":
    main()
