"""What the pretraining mix of PPO does in the demo world: perplexity of held-out base text and win rate, with it and without.

    PYTHONPATH=data python benchmarks/ptx.py --output_dir runs/ptx --seeds 42 43 44

For each seed the demo's stages are trained once up to the reward model, and PPO twice from the same versions: by its recipe,
and with `ptx_coef` 0. What is there from an earlier call is used again. Prints a table and writes `ptx.json` into the folder.
"""

import argparse
import json
from pathlib import Path

from demo_world.demo import RESPONSE_LENGTH, Demo, ensure, load_policy, read
from demo_world.judge import judge

from rlhf.cli import silence_libraries
from rlhf.evaluation import answer, mean_ci95, perplexity, win_rate
from rlhf.registry import Registry

ARMS = {"with ptx": [], "without ptx": ["--ptx_coef", "0"]}
BLOCK = 64  # tokens of raw text that the base was trained on at once
SEED_OF_ANSWERS = 1000


def train(root: Path, seed: int) -> Demo:
    """The demo up to the reward model, and a PPO version for each arm, tagged with its name."""
    run = f"ptx-{seed}"
    ensure("ppo", root, run, seed)
    registry, demo = Registry(root), Demo(root, run, seed)
    for name, words in ARMS.items():
        tag = name.replace(" ", "-")
        if tag not in registry.tags(run, "ppo"):
            demo.overrides["ppo"] = words
            registry.tag(demo.train("ppo"), tag)
    return demo


def measure(demo: Demo) -> dict[str, dict]:
    """Of SFT and both arms: perplexity of held-out base text; of the arms the win rate over SFT by the judge."""
    registry = Registry(demo.root)
    places = {"sft": f"{demo.run}/sft"} | {name: f"{demo.run}/ppo@{name.replace(' ', '-')}" for name in ARMS}
    prompts = [record["prompt"] for record in read(demo.data / "eval_prompts.jsonl")]
    text = [record["text"] for record in read(demo.data / "base_heldout.jsonl")]
    found: dict[str, dict] = {}
    utilities: dict[str, list[float]] = {}
    for name, place in places.items():
        artifact = registry.get(place)
        policy, tokenizer = load_policy(artifact)
        answers = answer(
            *(policy, tokenizer, prompts),
            response_length=RESPONSE_LENGTH,
            seed=demo.seed + SEED_OF_ANSWERS,
            batch_size=256,
        )
        utilities[name] = [judge(p, a).utility for p, a in zip(prompts, answers.texts)]
        found[name] = {
            "perplexity": perplexity(policy, tokenizer, text, block_size=BLOCK, packing_strategy="bfd_split")
        }
        if name != "sft":
            found[name] |= win_rate(utilities[name], utilities["sft"]) | {
                "kl": artifact.manifest["metrics"].get("kl", float("nan")),
                "rise": found[name]["perplexity"] - found["sft"]["perplexity"],
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/ptx"), help="root folder of the registry")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    args = parser.parse_args()
    silence_libraries()
    found = {seed: measure(train(args.output_dir, seed)) for seed in args.seeds}
    (args.output_dir / "ptx.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(
        "\n| seed | | perplexity | rise over SFT | win rate over SFT | 95 % | KL, nats |\n|---|---|---|---|---|---|---|"
    )
    for seed, rows in found.items():
        for name, row in rows.items():
            more = ("", "", "", "")
            if name != "sft":
                low, high = row["win_rate_ci95"]
                more = f"{row['rise']:+.2f}", f"{row['win_rate']:.3f}", f"({low:.3f}, {high:.3f})", f"{row['kl']:.2f}"
            print(f"| {seed} | {name} | {row['perplexity']:.2f} | {' | '.join(more)} |")
    for name in ARMS:
        rise, _ = mean_ci95([rows[name]["rise"] for rows in found.values()])
        rate, _ = mean_ci95([rows[name]["win_rate"] for rows in found.values()])
        print(f"\n{name}: perplexity {rise:+.2f} over SFT's, win rate {rate:.3f}, means of {len(found)} seeds")


if __name__ == "__main__":
    main()
