"""Compare quantizing on the way with `cp -r` of the same bf16 model, and with ModelOpt's own export of it, in turn and prepared alike.

Each scheme is planned once and its plan is run; ModelOpt loads the model, calibrates on 16 tokens and exports. The preparation and
the reading of the ratios are those of bench.cross.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from bench.cross import COPY, Contender, prepare, report
from bench.measure import Measured, nbytes, run, work_folder

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
    measured: dict[str, list[Measured]] = {contender.name: [] for contender in contenders}
    written: dict[str, int] = {}
    for count in range(asked.rounds + 1):
        for contender in contenders:
            if not count and contender.name == MODELOPT:
                continue  # a quarter of the time of a round, and no memory that the others have not taken
            prepare(source, output)
            one = run(contender.command)
            written[contender.name] = nbytes(output)
            if count:
                measured[contender.name].append(one)
            print(f"{f'round {count}' if count else 'not counted'}: {contender.name:<30}{one.seconds:6.2f} s", flush=True)
    prepare(source, output)
    report("quantize", measured, written, nbytes(source))


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
