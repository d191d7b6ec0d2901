"""Stages one after the other in the processes of one launch: `accelerate launch … tests/launched.py STAGE CONFIG …`.

Each goes through `run_stage`, as in its script; the start of the processes, which takes longer than a tiny stage, is shared.
"""

import gc
import sys

from rlhf.cli import run_stage


def main() -> None:
    words = sys.argv[1:]
    stages = list(zip(words[::2], words[1::2]))
    for i, (stage, config) in enumerate(stages):
        run_stage(stage, ["--config", config], last=i + 1 == len(stages))
        gc.collect()  # transformers knows of a launch under ZeRO 3 by an object of the stage before


if __name__ == "__main__":
    main()
