"""What else could be fused: the bytes that the real networks move between their matrix products, counted from shapes, without a GPU.

    python -m vlmedit.kernels.traffic [--side 512] [--json FILE]

Backbone, autoencoder's decoder and judge of real configurations (`vlmedit.cost.calls`, no weights) run forward and backward on the meta device, one
picture with its reference. Each operation that torch would launch reads its inputs and writes its outputs once; views move nothing; attention moves
what a fused kernel moves. What lies between the products is added up by the class of the module that asks for it and that of the one around it
(Attention/RMSNorm: the norms of queries and keys), the backward pass included, with the operations that move most.

A row is more than a fusion there could save, and so says where to look. It is no time: caches, torch.compile and the overlap with
products are not in it, and `papers/performance.py --profile` on a GPU has the last word. Not counted: recomputation, which repeats the
forward pass, and what the optimizer moves.
"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

NETWORKS = {  # what runs: the place that `vlmedit.cost.calls` knows
    "Z-Image": "Tongyi-MAI/Z-Image", "FLUX": "black-forest-labs/FLUX.1-Kontext-dev", "Qwen-Image": "Qwen/Qwen-Image-Edit",
    "decoder": "Tongyi-MAI/Z-Image", "InternVL3": "OpenGVLab/InternVL3-14B-hf",
}  # fmt: skip
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view", "_reshape_alias", "lift_fresh"}
PRODUCTS, ATTENTION = "matrix products", "attention"


@dataclass
class Moved:
    """By one kind of module, or by all products: launches, bytes, FLOPs, and bytes by operation."""

    launches: int = 0
    bytes: int = 0
    flops: float = 0.0
    operations: Counter = field(default_factory=Counter)

    def add(self, operation: str, size: int, flops: float = 0.0) -> None:
        self.launches += 1
        self.bytes += size
        self.flops += flops
        self.operations[operation] += size


class Traffic(TorchDispatchMode):
    """Counts while it is entered; `found` maps modules' classes, or one of the two kinds above, to what they moved. An operation of the backward
    pass belongs to the module in which its node of the graph was made."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: dict[str, Moved] = {}
        self.within, self.made = [type(model).__name__], {}  # classes of the modules at work, outermost first; a node's number -> classes
        self.hooks = []
        for module in model.modules():
            self.hooks.append(module.register_forward_pre_hook(lambda m, _: self.within.append(type(m).__name__)))
            self.hooks.append(module.register_forward_hook(lambda *_: self.within.pop() and None))

    def __exit__(self, *error):
        super().__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def note(self, kind: str, operation: str, tensors: list[Tensor], flops: float = 0.0) -> None:
        distinct = {id(t): min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors}  # an expanded row is read once
        self.found.setdefault(kind, Moved()).add(operation, sum(distinct.values()), flops)

    def where(self) -> str:
        """Classes of the innermost module that is at work, or whose backward pass is, and of the one around it."""
        if node := torch._C._current_autograd_node():
            return self.made.get(node._sequence_nr(), self.within[0])  # the sum of two gradients has no module
        return self.made.setdefault(torch.autograd._get_sequence_nr() - 1, "/".join(self.within[-2:]))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        packet, place = function.overloadpacket, self.where()
        if function.is_view or packet.__name__ in NOTHING:
            return result
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        if packet in flop_registry:
            self.note(PRODUCTS, packet.__name__, tensors, flop_registry[packet](*args, **(kwargs or {}), out_val=result))
        elif tensors:
            self.note(place, packet.__name__, tensors)
        return result


class _Attention(torch.autograd.Function):
    """Moves what a fused kernel moves, whose scores never leave the chip."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, traffic: Traffic) -> Tensor:
        out = v.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.traffic = traffic
        ctx.save_for_backward(q, k, v, out)
        traffic.note(ATTENTION, "forward", [q, k, v, out], 4.0 * q.numel() * k.shape[-2])
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, out = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        ctx.traffic.note(ATTENTION, "backward", [q, k, v, out, grad, *grads], 10.0 * q.numel() * k.shape[-2])
        return *grads, None


class _Fused(TorchFunctionMode):
    def __init__(self, traffic: Traffic):
        super().__init__()
        self.traffic = traffic

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3] if len(args) >= 3 else (kwargs[name] for name in ("query", "key", "value"))
            return _Attention.apply(q, k, v, self.traffic)  # fewer heads of keys and values are shared, not copied
        return function(*args, **(kwargs or {}))


def count(model: nn.Module, call: Callable[[], Tensor]) -> dict[str, Moved]:
    """What forward and backward of `call`, whose result may carry a graph, move: by class of module, largest first."""
    traffic = Traffic(model)
    with traffic, _Fused(traffic):
        out = call()
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    model.zero_grad(set_to_none=True)
    return dict(sorted(traffic.found.items(), key=lambda item: -item[1].bytes))


def calls(name: str, side: int) -> Iterator[tuple[str, nn.Module, Callable[[], Tensor]]]:
    """Part, module and call of one network at a picture's side. `vlmedit.cost.calls` knows how each is called, so its own counter is listened to."""
    from vlmedit.cost import calls as costs
    from vlmedit.cost import counting

    heard = []
    listen = lambda model, call, *_: heard.append((model, call)) or counting.Call(0.0, 0, 0)
    place, latent = NETWORKS[name], (side // 8, side // 8)
    with mock.patch.object(counting, "count", listen):
        if name == "decoder":
            costs.decoder_call.__wrapped__(costs.AutoencoderCodec(counting.on_meta(costs.published(place).autoencoder)), latent)
            heard[0][0].requires_grad_(False)
        elif "VL" in name:
            model = costs.PUBLISHED[place]()
            counting.vision_call(model)
            counting.language_call(model, 2 * 256 + costs.WORDS)
        else:
            costs.backbone_call.__wrapped__(counting.on_meta(costs.published(place).transformer), latent, True)
    parts = ("vision, a picture", "language, two questions") if "VL" in name else ("",)
    for part, (model, call) in zip(parts, heard, strict=True):
        yield f"{name} {part}".strip(), model, call


def lines(name: str, found: dict[str, Moved], rows: int = 6) -> Iterator[str]:
    """A network's share of the table: products and attention, then the classes that move most between them."""
    between = {kind: m for kind, m in found.items() if kind not in (PRODUCTS, ATTENTION)}
    total = sum(m.bytes for m in between.values())
    head = ", ".join(f"{kind} {found[kind].bytes / 1e9:.1f} GB for {found[kind].flops / 1e12:.1f} TFLOP" for kind in (PRODUCTS, ATTENTION) if kind in found)
    yield f"{name}: {head}; between them {total / 1e9:.1f} GB in {sum(m.launches for m in between.values())} launches"
    for kind, m in list(between.items())[:rows]:
        most = ", ".join(f"{operation} {size / 1e9:.1f}" for operation, size in m.operations.most_common(5))
        yield f"  {kind:<46}{m.bytes / 1e9:>7.1f} GB {m.bytes / total:>4.0%}{m.launches:>7} launches   {most}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlmedit.kernels.traffic", description="Bytes that real networks move between their matrix products, counted from shapes.")
    parser.add_argument("--side", type=int, choices=(512, 1024), default=512, help="of the picture and its reference")
    parser.add_argument("--network", choices=tuple(NETWORKS), help="one of them alone")
    parser.add_argument("--json", metavar="FILE", help="write the counts there as well")
    options = parser.parse_args(arguments)
    if options.json and not os.path.isdir(os.path.dirname(os.path.abspath(options.json))):
        parser.error(f"--json {options.json}: its folder does not exist; make it first")
    report = {}
    for name in [options.network] if options.network else NETWORKS:
        for part, model, call in calls(name, options.side):
            found = count(model, call)
            report[part] = {kind: vars(m) for kind, m in found.items()}
            print("\n".join(lines(part, found)), flush=True)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"side": options.side, "networks": report}, file, indent=1)


if __name__ == "__main__":
    main()
