"""``python -m carnet.quantize``: print every recipe, with what is stored for a weight of 256 x 512."""

from carnet.quantize.recipes import RECIPES, Recipe
from carnet.quantize.styles import STYLES, kept

SHAPE = (256, 512)


def main() -> None:
    """Print the table that docs/quantize.md shows."""
    print(f"{'style':<20}{'scheme':<14}{'a scale for':<14}{'codes and scales of a bf16 weight of 256 x 512'}")
    for recipe in RECIPES:
        static = recipe.scheme in STYLES[recipe.style].inputs
        stored = [
            f"{each.name} {each.dtype} {' x '.join(map(str, each.shape)) or 'scalar'}"
            for each in kept(recipe, "weight", SHAPE, "bf16", static=static)
        ]
        print(f"{recipe.style:<20}{recipe.scheme:<14}{_block(recipe):<14}{', '.join(stored)}")


def _block(recipe: Recipe) -> str:
    rows, columns = recipe.block
    if not rows:
        return "all"
    return f"{rows} x {columns}" if columns else "a row"


if __name__ == "__main__":
    main()
