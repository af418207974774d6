"""Cases of context parallelism, run on every rank: the pipeline on one process, then on all."""

from __future__ import annotations

from typing import Any

import diffusers.hooks.context_parallel as hooks
import diffusers.models.attention_dispatch as dispatch
import tiny_hosts
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ContextParallelConfig
from numerics import relative

import pag_fast
from pag_fast import Branch, PatchConfig
from pag_fast import perturbations as P

STRENGTHS = (0.3, 0.8)
EACH: dict[str, Any] = {
    "identity": P.Identity(),
    "soft": P.SoftIdentity(STRENGTHS),
    "blur": P.BlurredQueries(),
    "noise": P.NoisyScores(2.0),
    "shuffle": P.ShuffledTokens(),
    "skip": P.SkippedBlock(),
}
MANY = ("identity in middle", "several", "identities")
WAYS: dict[str, dict[str, Any]] = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "uneven ulysses": {"ulysses_degree": 2, "ulysses_anything": True},
    "uneven ring": {"ring_degree": 2, "ring_anything": True},
}


def _attention(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    **_: Any,
) -> Any:
    """Attention for diffusers' ring, which wants the log-sum-exp, that runs on a CPU."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if not return_lse:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = op(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _gathered(x: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """What diffusers gathers of parts of several lengths; gloo's parts have to be equal."""
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([x.shape[dim]]), group=group)
    most = int(max(sizes))
    padded = torch.zeros(*x.shape[:dim], most, *x.shape[dim + 1 :])
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    pairs = zip(parts, sizes, strict=True)
    return torch.cat([part.narrow(dim, 0, int(size)) for part, size in pairs], dim=dim)


def prepare() -> None:
    """Have diffusers' own context parallelism run on a CPU."""
    dispatch._native_attention_forward_op = _attention
    hooks._all_gather_anything = _gathered


def parallel(pipe: Any, way: str) -> None:
    """Cut the sequences of a pipeline's denoiser."""
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(**WAYS[way]))


def arguments(name: str, pipe: Any, way: str, cfg: bool, **more: Any) -> dict[str, Any]:
    """Of a call; uneven ways get sequences of odd lengths, and rings no padded prompts."""
    uneven = "uneven" in way
    tiny_hosts.pipelines.TEXT = 5 if uneven else 6
    call = tiny_hosts.call_kwargs(name, pipe, cfg=cfg, **more)
    if uneven and name == "FluxPipeline":
        call |= {"height": 48, "width": 48}  # nine tokens
    if uneven and name == "QwenImagePipeline":
        call |= {"height": 48, "width": 48}
    if "ring" in way:
        call = {k: v for k, v in call.items() if not k.endswith("mask")}
    return call


class Alone:
    """Pictures of one process, each made once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.made: dict[Any, torch.Tensor] = {}

    def __call__(self, way: str, cfg: bool, case: str, options: dict[str, Any]) -> torch.Tensor:
        pipe = tiny_hosts.build(self.name)
        call = arguments(self.name, pipe, way, cfg, **({"pag_scale": 2.0} if options else {}))
        shape = "uneven" in way, any(k.endswith("mask") for k in call), cfg, case
        if shape not in self.made:
            if options:
                pag_fast.patch(pipe, **options)
            self.made[shape] = tiny_hosts.latents(pipe, call)
        return self.made[shape]


def cases(name: str) -> dict[str, dict[str, Any]]:
    """Options of ``patch``: every perturbation, and several branches at once."""
    layers = tiny_hosts.HOSTS[name].layers
    found: dict[str, dict[str, Any]] = {
        f"{case} in {where}": {"layers": layers[where], "perturbation": how}
        for (case, how), where in zip(EACH.items(), ["middle", "all"] * 3, strict=True)
    }
    several = [Branch(layers["middle"], how) for how in EACH.values()]
    found["several"] = {"branches": [*several, Branch(layers["all"], "identity")]}
    identities = [Branch(layers["all"], "identity", 1.0), Branch(layers["middle"], "identity", 2.0)]
    found["identities"] = {"branches": identities}
    return {case: {"config": PatchConfig(**options)} for case, options in found.items()}


def exact(_: Any, name: str) -> dict[str, list[float]]:
    """``[difference between one process and two, difference that PAG makes]`` of every case."""
    prepare()
    alone, found = Alone(name), {}
    for way in WAYS:
        for cfg in (True, False):
            stock = alone(way, cfg, "stock", {})
            for case, options in cases(name).items():
                # each perturbation is among the several, too
                if (way, cfg) != ("ulysses", True) and case not in MANY:
                    continue
                pipe = tiny_hosts.build(name)
                parallel(pipe, way)
                pag_fast.patch(pipe, **options)
                out = tiny_hosts.latents(pipe, arguments(name, pipe, way, cfg, pag_scale=2.0))
                expected = alone(way, cfg, case, options)
                key = f"{way}, {case}, {'CFG' if cfg else 'no CFG'}"
                found[key] = [relative(out, expected), relative(expected, stock)]
    return found


def on_branches(mesh: Any, name: str) -> dict[str, Any]:
    """As :func:`exact`, with branches on one dimension of ``mesh`` and tokens on the others."""
    prepare()
    alone, found = Alone(name), {}
    for cfg in (True, False):
        stock = alone("ulysses", cfg, "stock", {})
        for case in ("identity in middle", "noise in all", "several"):
            options = cases(name)[case]
            expected = alone("ulysses", cfg, case, options)
            pipe = tiny_hosts.build(name)
            tokens = ContextParallelConfig(ulysses_degree=2, mesh=mesh["ring", "ulysses"])
            pipe.transformer.enable_parallelism(config=tokens)
            pag_fast.patch(pipe, mesh=mesh["branch"], **options)
            out = tiny_hosts.latents(pipe, arguments(name, pipe, "ulysses", cfg, pag_scale=2.0))
            numbers = [relative(out, expected), relative(expected, stock)]
            found[f"{case}, {'CFG' if cfg else 'no CFG'}"] = numbers, out
    return found


def refused(_: Any) -> dict[str, str]:
    """What is said where two processes would not make the picture of one."""
    prepare()
    found = {}

    def refuse(case: str, name: str, cut: Any, way: str = "ulysses", **model: Any) -> None:
        pipe = tiny_hosts.build(name, **model)
        cut(pipe)
        call = arguments(name, pipe, way, True, pag_scale=2.0)
        try:
            how = "skip" if case == "ring" else "identity"  # a skipped block sees no mask
            pag_fast.patch(pipe, layers=tiny_hosts.HOSTS[name].layers["middle"], perturbation=how)
            tiny_hosts.latents(pipe, call)
        except ValueError as error:
            found[case] = str(error)

    def by_hand(pipe: Any) -> None:
        other = tiny_hosts.build("FluxPipeline")
        parallel(other, "ulysses")
        config = other.transformer._parallel_config.context_parallel_config
        hooks.apply_context_parallel(pipe.transformer, config, pipe.transformer._cp_plan)

    def text_whole(pipe: Any) -> None:
        plan = dict(pipe.transformer._cp_plan)
        plan[""] = {k: v for k, v in plan[""].items() if k in ("hidden_states", "img_ids")}
        config = ContextParallelConfig(ulysses_degree=2)
        pipe.transformer.enable_parallelism(config=config, cp_plan=plan)

    def ulysses(pipe: Any) -> None:
        parallel(pipe, "ulysses")

    refuse("model", "LTXPipeline", ulysses)
    refuse("heads", "WanPipeline", ulysses, num_attention_heads=3)
    refuse("ring", "QwenImagePipeline", lambda pipe: parallel(pipe, "ring"))
    refuse("plan", "FluxPipeline", text_whole)
    refuse("by hand", "FluxPipeline", by_hand)
    return found
