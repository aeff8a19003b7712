"""Build carnet.live's kernels for an H100, which needs none: a line each, or an error."""

import re
import sys

from triton import compiler
from triton.backends.compiler import GPUTarget

from carnet.live import kernels
from carnet.live.batches import TALL, WIDE, WORDS
from carnet.live.copying import ON_GPUS
from carnet.quantize.recipes import RECIPES, WHOLE

H100 = GPUTarget("cuda", 90, 32)
TABLES = {"jobs": "*i64", "tiles": "*i32", "count": "i32"}


def build(kernel, given, meant, warps):
    """Build a kernel, and say how it reads weights; end where it reads them piecemeal."""
    signature = given | dict.fromkeys(meant, "constexpr")
    source = compiler.ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in meant.items()})
    built = compiler.compile(source, target=H100, options={"num_warps": warps} | kernels.UNFUSED)
    reads = sorted(set(re.findall(r"ld\.global\.\S+", built.asm["ptx"])))
    print(kernel.__name__, len(built.asm["cubin"]), *reads)
    if not {"ld.global.v4.b32", "ld.global.v2.b64"} & {*reads}:
        sys.exit("no read of sixteen bytes")


def main():
    """Build all that carnet launches."""
    for kernel, given, wide, (_, warps, step) in [
        (kernels._copy, TABLES, WORDS, kernels.COPYING),
        (kernels._amax, TABLES | {"most": "*i32"}, WIDE, kernels.MEASURING),
    ]:
        build(kernel, given, {"tall": TALL, "wide": wide, "step": step}, warps)
    for recipe in RECIPES:
        if recipe.scheme in ON_GPUS and recipe.style != "trtllm":
            for part in ("codes",) if recipe.block == WHOLE else ("codes", "scales"):
                build(kernels._code, TABLES | {"numbers": "*fp32"}, kernels.meant(recipe, part), kernels.CODING[1])


if __name__ == "__main__":
    main()
