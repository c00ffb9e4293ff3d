"""`python -m ernie_align`, which is also what `accelerate launch -m ernie_align` calls."""

from ernie_align.cli import main

if __name__ == "__main__":
    main()
