"""What the rewards know before anybody is trained with them: the judge in other words, the teacher as a judge, and the share of the teacher's
own pairs that the judge keeps. Writes papers/results/asking.json, which tables.py reads.

    nice python papers/asking.py            # about two minutes on one core
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from measure import load, write

from vlmedit.data.world import paired_batch, unpaired_batch
from vlmedit.equations.judge_loss import judge_loss
from vlmedit.equations.rewards import WORDINGS, TeacherJudge, reworded
from vlmedit.methods.synthetic_pairs import PAIR_EDITORS, SyntheticPairsConfig, approved, make_pairs

SEED = ("held-out", "asking")  # of requests that no trainer draws


def share(which) -> float:
    return which.float().mean().item()


@torch.no_grad()
def words(judge, requests, right) -> dict:
    """Per wording: how often a right result's edit is called done, a copy's not done, and the rest the same, on pairwise questions."""
    pair = torch.tensor([t not in ("remove", "nothing") for t in requests.types])
    found = {"n": int(pair.sum())}
    for name in WORDINGS:
        done, copied = (judge_loss(judge, reworded(requests, name), pictures)[1][:, pair] > 0.5 for pictures in (right, requests.reference))
        found[name] = {"right": share(done[0]), "copy": 1 - share(copied[0]), "same": share(done[1])}
    return found


@torch.no_grad()
def teacher(model, requests, right, draws: int) -> dict:
    """How often the teacher prefers the target's caption for a right result and the reference's for a copy, where the captions differ."""
    differ = (requests.reference_caption != requests.target_caption).any(1)
    margin = lambda pictures: torch.cat([TeacherJudge(model, draws).margin(p, s, t) for p, s, t in zip(*(x.split(64) for x in (pictures, requests.reference_caption, requests.target_caption)))])
    torch.manual_seed(0)
    good, copy = margin(right), margin(requests.reference)
    kinds = defaultdict(list)
    for kind, there, value in zip(requests.types, differ.tolist(), good.tolist()):
        if there:
            kinds[kind].append(value > 0)
    return {"n": int(differ.sum()), "draws": draws, "right": share(good[differ] > 0), "copy": share(copy[differ] < 0), "right_by_type": {k: sum(v) / len(v) for k, v in kinds.items()}}


@torch.no_grad()
def pairs(model, judge, n: int) -> dict:
    """Share of each pair editor's pairs that the judge says yes to twice, in all and by edit type."""
    found, config = {}, SyntheticPairsConfig()
    for name in PAIR_EDITORS:
        torch.manual_seed(0)
        kept, kinds = [], defaultdict(list)
        for first in range(0, n, 64):
            requests = unpaired_batch(min(64, n - first), config.side, *SEED, name, first)
            fine = approved(judge, requests, *make_pairs(model, requests, config.replace(pair_editor=name)), config.threshold)
            kept += fine.tolist()
            for kind, yes in zip(requests.types, fine.tolist()):
                kinds[kind].append(yes)
        found[name] = {"n": n, "kept": sum(kept) / n, "by_type": {k: sum(v) / len(v) for k, v in kinds.items()}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=256, help="requests")
    parser.add_argument("--draws", type=int, default=2, help="noises per picture of the teacher as judge")
    args = parser.parse_args()
    requests, right = unpaired_batch(args.n, 32, *SEED), paired_batch(args.n, 32, *SEED).target
    model, judge = load("teacher"), load("judge")
    write("asking", {"words": words(judge, requests, right), "teacher": teacher(model, requests, right, args.draws), "pairs": pairs(model, judge, args.n // 2)})


if __name__ == "__main__":
    main()
