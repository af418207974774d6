"""What a patch stands in for in diffusers' pipelines, and whose code is there as a call begins.

A patched pipeline computes by itself what some methods, properties, functions and processors of
diffusers' compute. Where somebody has put other code in their place (a subclass, a function on the
instance, or on diffusers' own class or module) it would be passed over: it is followed, where the
call can run it, or refused by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any

from ..config import PatchConfig
from .compatibility.origins import origin, package

# ---- what is stood in for ----

_INSTALLS = "_set_pag_attn_processor"
_COMBINES = "_apply_perturbed_attention_guidance"
# what diffusers' combination runs, and ours does not ask
_OF_COMBINATION = (
    _COMBINES,
    "_get_pag_scale",
    "do_pag_adaptive_scaling",
    "pag_adaptive_scale",
)
_RESCALE, _RESCALES = "guidance_rescale", "rescale_noise_cfg"
# a pipeline that has none of PAG gets these
_ADDED = (
    "pag_scale",
    "pag_adaptive_scale",
    "pag_applied_layers",
    "do_perturbed_attention_guidance",
    "set_pag_applied_layers",
)
_SAG_CLASS = "StableDiffusionSAGPipeline"
_OF_SAG = ("pred_epsilon", "pred_x0", "prepare_ip_adapter_image_embeds", "sag_masking")
_SAG_BLURS, _SAG_STORES = "gaussian_blur_2d", "CrossAttnStoreProcessor"
# they are about a combination that is ours
_OPTIONS = ("schedule", "rescale_mode", "reuse", "branches", "mesh")


# ---- whose code something is ----


def is_diffusers(thing: Any, name: str, twin: Any = None) -> bool:
    """Whether a function or a property is the one that diffusers has under this name.

    Args:
        twin: diffusers' own, of which a class in other files may have a copy.
    """
    function = thing.fget if isinstance(thing, property) else thing
    if not isinstance(function, FunctionType):
        return False
    # by its globals and its code: functools.wraps copies every name
    if package(origin(function)) == "diffusers":
        return function.__code__.co_name == name
    if twin is None or not is_diffusers(twin, name):
        return False
    copied: Any = twin.fget if isinstance(twin, property) else twin
    return _text(function.__code__) == _text(copied.__code__)


def _text(code: CodeType) -> tuple[Any, ...]:
    """What a piece of code does, wherever it was written and whatever its docstring says."""
    consts = [_text(x) if isinstance(x, CodeType) else x for x in code.co_consts]
    if consts and isinstance(consts[0], str):
        consts[0] = None
    return code.co_code, code.co_names, code.co_varnames, repr(consts)


def along_mro(cls: type, name: str) -> Any:
    """What a class has under a name, unbound; ``None`` without."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)


def is_replaced(cls: type, name: str) -> bool:
    """Whether a class of pipelines has somebody else's code in the place of diffusers' own."""
    found = along_mro(cls, name)
    mixin: Any = getattr(sys.modules.get("diffusers.pipelines.pag.pag_utils"), "PAGMixin", None)
    twin = None if mixin is None else vars(mixin).get(name)
    return found is not None and not is_diffusers(found, name, twin)


def _is_on(pipe: Any, cls: type, name: str) -> bool:
    """Whether somebody has put a function on this one pipeline, which hides the class's."""
    return name in vars(pipe) and not isinstance(along_mro(cls, name), property)


# ---- pipelines with PAG ----


@dataclass(frozen=True)
class OwnCode:
    """What of a call's guidance is not diffusers' own, and so is left to the pipeline.

    Attributes:
        combines: somebody's method, for which diffusers' combination runs as it does in stock;
            empty where ours runs.
        wraps: the combination is a function on the instance, whatever that makes of ours.
        rescales: the pipeline rescales its guidance by itself, as ``guidance_rescale`` says.
    """

    combines: str = ""
    wraps: bool = False
    rescales: bool = True


# in front of a call
STOCK = OwnCode()


def look_at(pipe: Any, cls: type, config: PatchConfig, loop: FrameType | None = None) -> OwnCode:
    """Whose code a PAG pipeline has where a patch stands in for it; changes nothing.

    Args:
        cls: the pipeline's class without a patch.
        loop: the frame that runs its denoising loop.

    Raises:
        ValueError: code that would be passed over, or an option that would be.
    """
    pair = getattr(pipe, "_pag_attn_processors", None)
    check_pair(tuple(pair) if isinstance(pair, list) else pair)
    # on the instance it runs: the loop finds it in front of ours
    if is_replaced(cls, _INSTALLS):
        raise ValueError(
            f"{cls.__name__} has its own {_INSTALLS}, which a patch would pass over: pag_fast "
            "perturbs the layers of pag_applied_layers. Choose them there, with "
            "pag_fast.patch(pipe, layers) and perturbation=..., or take that method away."
        )
    on_class = [name for name in _OF_COMBINATION if is_replaced(cls, name)]
    on_pipe = [name for name in _OF_COMBINATION[1:] if _is_on(pipe, cls, name)]
    combines = next(iter([*on_class, *on_pipe]), "")
    if combines:
        check_options(cls, config, combines)
    wraps = _is_on(pipe, cls, _COMBINES)
    return OwnCode(combines, wraps, _rescales_itself(cls, loop))


def check_options(cls: type, config: PatchConfig, name: str) -> None:
    """Refuse options of our combination where somebody's code is in its place.

    Raises:
        ValueError: such an option is set.
    """
    for option in _OPTIONS:
        if getattr(config, option) is not None:
            raise ValueError(
                f"{cls.__name__} has its own {name}, which combines the branches by itself, and "
                f"{option}={getattr(config, option)!r} would be passed over: leave one of them out."
            )


def _rescales_itself(cls: type, loop: FrameType | None) -> bool:
    """Whether a loop rescales otherwise than by what our combination does at once."""
    if loop is None or package(loop.f_globals.get("__name__", "")) != "diffusers":
        return True
    if not is_diffusers(along_mro(cls, _RESCALE), _RESCALE):
        return True
    return not is_diffusers(loop.f_globals.get(_RESCALES), _RESCALES)


def check_pair(pair: Any) -> None:
    """Refuse processors that a patched pipeline would not run.

    Raises:
        ValueError: others than diffusers' own for PAG, with CFG and without.
    """
    if pair is None:
        return
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(f"pag_attn_processors must be a tuple of two processors; got {pair!r}.")
    for processor, cfg in zip(pair, (True, False), strict=True):
        home = next((c for c in type(processor).__mro__ if "__call__" in vars(c)), object)
        own = vars(home).get("__call__")
        if not home.__name__.startswith("PAG") or not is_diffusers(own, "__call__"):
            raise ValueError(
                f"A patched pipeline runs its own attention processors, and "
                f"{type(processor).__name__} is not one of diffusers' PAG processors as diffusers "
                "wrote them: call pag_fast.unpatch(pipe) to use it, or say with perturbation=... "
                "what happens in the perturbed layers."
            )
        if cfg != home.__name__.startswith("PAGCFG"):
            raise ValueError(
                f"pag_attn_processors are one for classifier-free guidance and one without, in "
                f"this order, and {home.__name__} is in the other's place: exchange them."
            )


# ---- pipelines without PAG ----


def check_has_no_pag(cls: type) -> None:
    """Refuse a pipeline without diffusers' PAG that has something of the kind all the same.

    Raises:
        ValueError: it has one of the attributes that a patch adds.
    """
    for name in _ADDED:
        if along_mro(cls, name) is not None:
            raise ValueError(
                f"{cls.__name__} has its own {name}, which a patch would pass over: pag_fast gives "
                "PAG to pipelines that have none. Rename it, or patch the class that it inherits "
                "from."
            )


def look_at_host(cls: type) -> OwnCode:
    """As :func:`look_at`: such a pipeline guides by itself, by a rescale that may be its own."""
    found = along_mro(cls, _RESCALE)
    own = found is not None and not is_diffusers(found, _RESCALE)
    return OwnCode(rescales=own)


# ---- Self-Attention Guidance ----


def check_sag(pipe: Any, cls: type) -> None:
    """Refuse a pipeline of Self-Attention Guidance that is not as diffusers wrote it.

    Raises:
        ValueError: somebody else's code where a patch stands in for diffusers'.
    """
    for name in _OF_SAG:
        if name in vars(pipe) or not is_diffusers(along_mro(cls, name), name):
            raise ValueError(_own(cls.__name__, name))
    names = along_mro(cls, "sag_masking").__globals__
    if not is_diffusers(names.get(_SAG_BLURS), _SAG_BLURS):
        raise ValueError(_own(names["__name__"], _SAG_BLURS))
    stores: Any = names.get(_SAG_STORES)
    home = vars(stores).get("__call__") if isinstance(stores, type) else None
    if not is_diffusers(home, "__call__"):
        raise ValueError(_own(names["__name__"], f"{_SAG_STORES}.__call__"))


def _own(where: str, name: str) -> str:
    return (
        f"{where} has its own {name}, which a patch would pass over: pag_fast takes {_SAG_CLASS} "
        "as diffusers wrote it."
    )
