"""Seconds of an optimiser's step on the demo's model: AdamW, Muon as stages take it, and PyTorch's own Muon for the matrices.

    python benchmarks/muon.py --threads 1

The three take turns, on the same random gradients; medians.
"""

import argparse
import statistics
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf.muon import Muon, hidden_matrices

DEMO = {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 1024, "n_positions": 256}  # configs/pretrain/demo.yaml
IDS = {"bos_token_id": 0, "eos_token_id": 0}


def seconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**DEMO, **IDS))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    matrices = hidden_matrices(model)
    optimizers = {
        "AdamW": torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True),
        "Muon": Muon(model.parameters(), matrices, lr=1e-4, fused=True),
        "torch.optim.Muon, matrices alone": torch.optim.Muon(list(matrices), lr=1e-4),  # type: ignore[arg-type]
    }
    for optimizer in optimizers.values():
        optimizer.step()
    taken: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(args.rounds):
        for name, optimizer in optimizers.items():
            taken[name].append(seconds(optimizer))
    print(f"| optimiser | seconds a step, {args.threads} thread(s) |\n|---|---|")
    for name, times in taken.items():
        print(f"| {name} | {statistics.median(times):.4f} |")


if __name__ == "__main__":
    main()
