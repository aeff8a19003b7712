"""``python -m carnet``."""

from carnet.cli import main

if __name__ == "__main__":
    main(prog_name="carnet")
