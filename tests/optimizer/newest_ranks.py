"""What ranks.py does, with the newest megatron-core, which is found first on the path."""

from tests.megatron import newest  # noqa: F401  # before any module of Megatron's
from tests.optimizer.ranks import main

if __name__ == "__main__":
    main()
