"""Compare quantizing on the way with `cp -r` of the same bf16 model, and with ModelOpt's own export of it, in turn and prepared alike.

Each scheme is planned once and its plan is run; ModelOpt loads the model, calibrates on 16 tokens and exports. The preparation and
the reading of the ratios are those of bench.cross.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bench.cross import COPY, Contender, report, take_turns
from bench.measure import nbytes, run, work_folder

MODELOPT = "ModelOpt, fp8"
SCHEMES = {  # and whether it needs the activations' largest magnitudes
    "carnet run, fp8": (("--to", "hf", "--quantize", "fp8"), True),
    "carnet run, fp8, trtllm tp 2": (("--to", "trtllm", "--tp", "2", "--quantize", "fp8"), True),
    "carnet run, fp8-channel": (("--to", "hf", "--quantize", "fp8-channel", "--style", "compressed-tensors"), False),
    "carnet run, fp8-block": (("--to", "hf", "--quantize", "fp8-block", "--style", "compressed-tensors"), False),
    "carnet run, nvfp4": (("--to", "hf", "--quantize", "nvfp4"), True),
    "carnet run, mxfp8": (("--to", "hf", "--quantize", "mxfp8"), False),
    "carnet run, mxfp4": (("--to", "hf", "--quantize", "mxfp4"), False),
}


def main() -> None:
    """Measure all contenders and show them side by side."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5, help="measurements of each contender (5)")
    options.add_argument("--without-modelopt", action="store_true", help="leave out the slowest")
    asked = options.parse_args()
    work = work_folder()
    print(f"model: 1.2 GB below {work}, written once", flush=True)
    subprocess.run([sys.executable, "-m", "bench.model", str(work)], check=True)
    source, output = work / "hf-llama", work / "output"
    contenders = [Contender(COPY, ("cp", "-r", str(source), str(output))), *plans(source, work)]
    if not asked.without_modelopt:
        contenders.append(Contender(MODELOPT, (sys.executable, "-m", "bench.modelopt_fp8", str(source), str(output))))
    # ModelOpt's is a quarter of the time of a round, and takes no memory that the others have not taken
    report("quantize", *take_turns(contenders, asked.rounds, source, output, once=(MODELOPT,)), nbytes(source))


def plans(source: Path, work: Path) -> list[Contender]:
    """Plan each scheme once; running the plan is what is measured."""
    found = []
    for number, (name, (words, needs)) in enumerate(SCHEMES.items()):
        plan = work / f"quantize-{number}.plan"
        plan.unlink(missing_ok=True)
        amaxes = ("--amax", str(work / "amax.safetensors")) if needs else ()
        run(["carnet", "plan", str(source), *words, *amaxes, "-o", str(plan)])
        found.append(Contender(name, ("carnet", "run", str(plan), str(work / "output"))))
    return found


if __name__ == "__main__":
    main()
