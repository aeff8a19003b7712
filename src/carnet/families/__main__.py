"""``python -m carnet.families``: print what carnet knows, a line for each family."""

from carnet.families.known import FAMILIES


def main() -> None:
    """Print the table that docs/families.md shows."""
    print(f"{'family':<14}{'Hugging Face':<28}{'TensorRT-LLM':<28}what it fixes")
    for family in sorted(FAMILIES, key=lambda family: family.name):
        fixed = ", ".join(f"{name} {value}" for name, value in family.traits.items())
        trtllm = "-" if family.trtllm is None else family.trtllm.architecture
        print(f"{family.name:<14}{family.hf.architecture:<28}{trtllm:<28}{fixed}")


if __name__ == "__main__":
    main()
