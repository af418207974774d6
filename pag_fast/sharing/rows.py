"""Row levels of a guided batch, and what moves tensors between them inside of a forward.

A PAG batch is ``[uncond | cond | perturbed]`` (CFG off: ``[cond | perturbed]``), each branch a slab
of B rows. Until something sets two branches apart their rows are equal, and one slab can stand for
both:

    MERGED   uncond = cond = perturbed    1 slab
    SHARED   cond = perturbed             2 slabs (CFG off: 1)
    SPLIT    all apart                    3 slabs (CFG off: 2)

Slabs part in a fixed order and always at the end of the batch, so going up a level appends copies
of the last slab and going down drops slabs from the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import zip_longest
from typing import Any

import torch

from .sequence import Sequence
from .threads import Thread
from .tokens import Run, Tokens, in_runs

MERGED, SHARED, SPLIT = 0, 1, 2
LEVEL_NAMES = ("merged", "shared", "split")

# arguments with a leading size that is not the batch, however the numbers fall
UNBATCHED = frozenset(
    {
        "control_hidden_states_scale",  # one for each layer
        "img_ids",
        "ip_adapter_masks",
        "rope_interpolation_scale",
        "txt_ids",
    }
)
# tables of [tokens, channels], or of [rows, tokens, channels] where tokens differ between rows
ROTARY = frozenset({"freqs_cis", "image_rotary_emb", "rotary_emb"})


class BranchState:
    """What one model currently runs: read by what is on it, written before each forward.

    Attributes:
        slabs: number of slabs at the levels MERGED, SHARED and SPLIT, e.g. ``(1, 2, 3)``; equal
            numbers mean that nothing is shared there. ``None``: there is no perturbed branch.
        epoch: another number whenever the conditioning, or how many slabs it has, has changed.
        step: number of the forward that runs.
        context: which of several passes with conditionings of their own takes its turn.
        num_contexts: text tokens of each sample, where blocks get text and image as one sequence.
        num_image: image tokens of each sample, likewise.
        size: height and width of the latents.
        clock: number of the step in its pipeline call, one int64 on the device: random numbers
            start from it. A tensor, so that compiled graphs are the same in every step.
        thread: the thread whose forward of the model runs on what was decided; ``None`` between
            forwards.
        entered: how many perturbed layers the forward has come through, outside of graphs.
        added: what a T2I-Adapter adds behind down blocks that do not take it themselves, by name.
        checked: whose turn it is to compute again what is kept from step to step.
        tokens: of the attentions of a model that was traced, which are the image's, by name.
        sequence: in which order modules of a model that was traced have to run; ``None``: known.
        ranks: how tokens lie on several ranks (:mod:`pag_fast.runtime.ranks.token_ranks`);
            ``None``: all are here. ``num_contexts`` and ``num_image`` count those that are here.
        head_rank: where the heads of a perturbed layer are on several ranks, which share is here.
    """

    def __init__(self) -> None:
        self.slabs: tuple[int, int, int] | None = None
        self.epoch = 0
        self.step = 0
        self.context = ""
        self.num_contexts: tuple[int, ...] = ()
        self.num_image = 0
        self.size: tuple[int, int] | None = None
        self.clock: torch.Tensor | None = None
        self.thread: Thread | None = None
        self.entered = 0
        self.checked = 0
        self.added: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, Tokens] = {}
        self.sequence: Sequence | None = None
        self.ranks: Any = None
        self.head_rank = 0

    def mark_runs(self, names: Iterable[str], runs: tuple[Run, ...], device: torch.device) -> None:
        """Write down where the image's tokens are in what the attentions ``names`` attend to."""
        self.tokens = dict.fromkeys(names, in_runs(runs, device))
        self.num_contexts, self.num_image = tuple(run[0] for run in runs), runs[0][1]

    def clock_on(self, like: torch.Tensor) -> torch.Tensor:
        """The clock; at its first step where nobody has set it."""
        if self.clock is not None:
            return self.clock
        return torch.zeros(1, dtype=torch.int64, device=like.device)


def change_level(x: torch.Tensor, have: int, want: int) -> torch.Tensor:
    """``x`` of ``have`` slabs with ``want`` slabs: a slice going down, a real copy going up.

    Going up must copy: FreeU and T2I-Adapters write into the tensors behind the fork.
    """
    if want == have:
        return x
    unit = x.shape[0] // have
    if want < have:
        return x[: want * unit]
    return torch.cat([x] + [x[-unit:]] * (want - have))


def map_tensors(value: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with ``fn`` applied to every batched tensor in it, however deep."""
    if isinstance(value, torch.Tensor):
        return fn(value) if value.ndim else value
    if type(value) is tuple:
        return tuple([map_tensors(item, fn) for item in value])
    if type(value) is list:
        return [map_tensors(item, fn) for item in value]
    if type(value) is dict:
        return {k: map_tensors(v, fn) if is_batched(k, v) else v for k, v in value.items()}
    return value


def is_batched(name: str | None, value: Any) -> bool:
    """Whether an argument's tensors have rows in front."""
    if name in UNBATCHED:
        return False
    # no call: this runs for every argument of every block, and compilers follow it
    if name.__class__ is str and (  # keys of dicts may be numbers
        name in ROTARY or "rope" in name or "rotary" in name or "freqs" in name
    ):
        table = value[0] if isinstance(value, list | tuple) and value else value
        return isinstance(table, torch.Tensor) and table.ndim > 2
    return True


class Align:
    """Forward pre-hook: run a module on the rows of level ``runs``.

    The module's first input arrives with the slabs of level ``arrives``; it, and the arguments
    named in ``streams`` (tensors that have come through the model with it), go to ``runs``. All
    other batched arguments are conditioning, which arrives at a level as high or higher, and is
    cut to ``runs``. ``names`` are those of the module's positional arguments, where it has any
    that are not batched.
    """

    def __init__(
        self,
        state: BranchState,
        arrives: int,
        runs: int,
        streams: tuple[str, ...] = (),
        names: tuple[str, ...] = (),
        twice: tuple[str, ...] = (),
    ) -> None:
        self.state = state
        self.arrives = arrives
        self.runs = runs
        self.streams = streams
        self.names = names
        self.twice = twice

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        slabs = self.state.slabs
        if slabs is None:
            return None
        have, want, full = slabs[self.arrives], slabs[self.runs], slabs[SPLIT]
        if have == want == full and not self.streams:
            return None
        # kwargs is this call's own dict, and this runs in every step: it is changed in place
        if args:
            primary = args[0]
        elif "hidden_states" in kwargs:
            primary = kwargs["hidden_states"]
        else:
            primary = _primary(kwargs)
        unit = primary.shape[0] // have
        rows = want * unit
        for name, value in kwargs.items():
            if value is None or value is False:
                continue
            if isinstance(value, torch.Tensor):
                if value is primary or name in self.streams:
                    kwargs[name] = change_level(value, value.shape[0] // unit, want)
                elif name in self.twice and value.shape[0] == 2 * full * unit:
                    kwargs[name] = torch.cat([half[:rows] for half in value.chunk(2)])
                elif _is_higher(value, rows, unit, slabs) and is_batched(name, value):
                    kwargs[name] = value[:rows]
            elif is_batched(name, value):
                kwargs[name] = _cut(value, rows, unit, slabs)
        if args:
            args = (change_level(primary, have, want), *self._cut_rest(args, rows, unit, slabs))
        return args, kwargs

    def _cut_rest(
        self, args: tuple[Any, ...], rows: int, unit: int, slabs: tuple[int, int, int]
    ) -> list[Any]:
        """The arguments behind the first, each with the rows of this level."""
        return [
            _cut(value, rows, unit, slabs) if is_batched(name, value) else value
            for name, value in zip_longest(self.names[1 : len(args)], args[1:])
        ]


def _primary(kwargs: dict[str, Any]) -> Any:
    """The stream of a resnet, or of a block that nobody has described."""
    if "input_tensor" in kwargs:
        return kwargs["input_tensor"]
    return next(value for value in kwargs.values() if isinstance(value, torch.Tensor))


def _is_higher(x: torch.Tensor, rows: int, unit: int, slabs: tuple[int, int, int]) -> bool:
    """Whether ``x`` has the rows of a level above ``rows``."""
    have = x.shape[0] if x.ndim else 0
    return have > rows and have % unit == 0 and have // unit in slabs


def _cut(value: Any, rows: int, unit: int, slabs: tuple[int, int, int]) -> Any:
    """``value`` with every tensor in it that has the rows of a higher level cut to ``rows``."""
    if isinstance(value, torch.Tensor):
        return value[:rows] if _is_higher(value, rows, unit, slabs) else value
    return map_tensors(value, lambda x: x[:rows] if _is_higher(x, rows, unit, slabs) else x)


class Leave:
    """Forward hook: hand a module's output on with the slabs of level ``leaves``.

    Going up happens here, behind the last module that needs less, rather than in front of the next:
    the caller then never holds both versions.
    """

    def __init__(self, state: BranchState, runs: int, leaves: int) -> None:
        self.state = state
        self.runs = runs
        self.leaves = leaves

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        slabs = self.state.slabs
        if slabs is None or slabs[self.runs] == slabs[self.leaves]:
            return None
        have, want = slabs[self.runs], slabs[self.leaves]
        if isinstance(output, torch.Tensor):
            return change_level(output, have, want)
        return map_tensors(output, lambda x: change_level(x, have, want))


class LeaveSkips:
    """Forward hook of a UNet down block: its skip tensors, each at the level that will consume it.

    A down block returns ``(stream, skips)``; skip i comes at level ``made[i]`` and is stored at
    level ``stored[i]``. A T2I-Adapter's residual goes into both the stream and the last skip, which
    are one tensor until then.
    """

    def __init__(
        self, state: BranchState, name: str, made: tuple[int, ...], stored: tuple[int, ...]
    ) -> None:
        self.state = state
        self.name = name
        self.made = made
        self.stored = stored

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        slabs = self.state.slabs
        if slabs is None or slabs[SHARED] == slabs[SPLIT]:
            return None
        stream, skips = output
        if self.name in self.state.added:
            stream = stream + self.state.added[self.name]
            skips = (*skips[:-1], stream)
        levels = zip(skips, self.made, self.stored, strict=True)
        return stream, tuple([change_level(x, slabs[made], slabs[to]) for x, made, to in levels])
