"""An experiment: can a student that removes and adds teach itself to move? Moves are what the shipped editor has not learnt; its own removal of
a thing followed by its own addition of the same thing often is one. Such results that the judge likes become pairs, and NP-Edit goes on with
them beside its own losses: no picture of the world's is seen that the no-pair path does not see.

    L = L_NP-Edit + w E |v(x_t, t, y, c) - (eps - x)|^2,   x = add(remove(y)) where P(edit | y, x, c) > .6 and P(identity | y, x, c) > .3

    nice python papers/moves.py            # about twenty minutes on one core; writes papers/results/moves.json

Times of the second term: 1 (the student's first call) for two draws in five, else logit-normal as in the warm-up.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from measure import write
from torch import Tensor

import vlmedit
from vlmedit.data.batches import TEXT_LENGTH
from vlmedit.data.world import sample_example
from vlmedit.evaluation.editing import evaluate, judge_by_oracle
from vlmedit.evaluation.judge import right_answers
from vlmedit.flow import flow_matching_loss, logit_normal_time
from vlmedit.methods._build import begin_roles, load_roles
from vlmedit.methods.npedit import NPEdit, NPEditConfig
from vlmedit.pipelines.shapes import EditPipeline, checkpoint
from vlmedit.seeds import rng_for
from vlmedit.training.run import Step
from vlmedit.training.trainer import train
from vlmedit.world.language import describe
from vlmedit.world.render import render
from vlmedit.world.tokenizer import encode

EDIT, REST, FIRST = 0.6, 0.3, 0.4


def composed(pipe: EditPipeline, n: int, seed: int, batch: int = 64) -> tuple[Tensor, Tensor, Tensor, dict]:
    """References, results (K, 3, S, S) and instructions (K, L) of moves that the judge lets pass, out of `n` requests; and how many there were,
    with the share that the oracle finds right, which nobody is told."""
    rows, right = [], []
    for first in range(0, n, batch):
        examples = [sample_example(rng_for("composed", seed, i), ("move",)) for i in range(first, min(n, first + batch))]
        reference = render([e.scene for e in examples], pipe.side)
        things = [e.scene.things[e.scene.find(e.edit.shape)] for e in examples]
        without = pipe(reference, [f"remove the {t.color} {t.shape}" for t in things], seed=first, output_type="pt").images
        moved = pipe(without, [f"add a {describe(t)}" for t in things], seed=first + 1, output_type="pt").images
        with torch.no_grad():
            edit, rest = right_answers(pipe.judge, examples, reference, moved)
        fine = ((edit > EDIT) & (rest > REST)).nonzero().flatten().tolist()
        rows += [(reference[k], moved[k], examples[k].instruction) for k in fine]
        verdicts = judge_by_oracle(examples, reference, moved).verdicts
        right += [verdicts[k].success for k in fine]
    references, results, words = zip(*rows)
    told = {"requests": n, "pairs": len(rows), "right": sum(right) / len(right)}
    return torch.stack(references), torch.stack(results), encode(list(words), TEXT_LENGTH), told


class WithPairs(NPEdit):
    """NP-Edit's update with flow matching on pairs beside it."""

    def __init__(self, *args, pairs: tuple[Tensor, Tensor, Tensor], weight: float, size: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.pairs, self.weight, self.size = pairs, weight, size

    def regularizers(self, batch) -> dict[str, Tensor]:
        rows = torch.randint(len(self.pairs[0]), (self.size,))
        reference, result, words = (part[rows].to(self.student.device) for part in self.pairs)
        text = self.student.encode_text(words)
        held = self.student.hold_reference(reference, text)
        first, usual = torch.rand(self.size) < FIRST, logit_normal_time(self.size, 3.0, "cpu")
        t = torch.where(first, torch.ones(self.size), usual).clamp(max=0.999).to(reference.device)
        loss = flow_matching_loss(lambda x, time: self.student(x, time, text, held), result, t, torch.randn_like(result)).mean()
        return {**super().regularizers(batch), "pairs_loss": self.weight * loss}


def train_with_pairs(
    config: NPEditConfig, pairs: tuple[Tensor, Tensor, Tensor], weight: float, size: int
) -> Iterator[Step]:
    """As `train_npedit`, with `size` of the pairs beside each batch."""
    config, accelerator = begin_roles(config)
    loaded = load_roles(config, accelerator)
    roles = loaded.student, loaded.fake, loaded.teacher, *loaded.judges[:1]
    method = WithPairs(config, *roles, loaded.codec, pairs=pairs, weight=weight, size=size)
    yield from train(method, loaded.data, config, accelerator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=4032, help="moves to compose")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--weight", type=float, default=1.0, help="of the pairs' loss")
    parser.add_argument("--batch", type=int, default=16, help="pairs per update")
    parser.add_argument("--n", type=int, default=512, help="held-out edits")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", default="runs/moves")
    args = parser.parse_args()
    pipe = vlmedit.load()
    before = evaluate(pipe, args.n)
    *pairs, told = composed(pipe, args.requests, args.seed)
    places = {role: str(checkpoint("shapes", name)) for role, name in (("teacher", "teacher"), ("judge", "judge"), ("student", "editor"))}
    config = NPEditConfig.make("laptop", **places, steps=args.updates, lr=6e-4, logit_gain_steps=0, seed=args.seed, out=args.out, save_every=100)
    for _ in train_with_pairs(config, tuple(pairs), args.weight, args.batch):
        pass
    after = evaluate(vlmedit.load(args.out), args.n, checkpoint=args.out)
    told |= {"updates": args.updates, "weight": args.weight, "batch": args.batch, "seed": args.seed}
    write("moves", {"pairs": told, "before": before, "after": after})


if __name__ == "__main__":
    main()
