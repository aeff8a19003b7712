"""The command ``carnet``, and ``python -m carnet``."""

import os
import sys


def main() -> None:
    """Run the command line."""
    from carnet.cli import edge

    edge.heed(edge.stop_at_once)  # until a command begins
    # the library behind numpy starts a thread a core at import, of which carnet uses none, and raises SIGINT where it cannot
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

    def command() -> object:
        from carnet.cli import main as commands

        return commands.main(prog_name="carnet", standalone_mode=False)

    os._exit(edge.guarded(command, next((word for word in sys.argv[1:] if not word.startswith("-")), "")))


if __name__ == "__main__":
    main()
