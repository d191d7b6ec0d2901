"""Stages one after the other in the processes of one launch: `accelerate launch … tests/launched.py STAGE CONFIG …`.

Each goes through `run_stage`, as in its script; the start of the processes, which takes longer than a tiny stage, is shared.
With KILL=STAGE in the environment process 1 is killed after step 7 of that stage.
"""

import gc
import os
import signal
import sys

from rlhf.cli import run_stage


def kill_process_1_after_step_7() -> None:
    from rlhf import training

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 7 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    training.MarkComplete.on_step_begin = kill  # of the step after it


def main() -> None:
    words = sys.argv[1:]
    stages = list(zip(words[::2], words[1::2]))
    for i, (stage, config) in enumerate(stages):
        if stage == os.environ.get("KILL"):
            kill_process_1_after_step_7()
        run_stage(stage, ["--config", config], last=i + 1 == len(stages))
        gc.collect()  # transformers knows of a launch under ZeRO 3 by an object of the stage before


if __name__ == "__main__":
    main()
