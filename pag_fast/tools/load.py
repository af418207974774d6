"""Models to try things on: the one that ships with the package, and the user's own."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .output import quiet_loading

EMOJI = Path(__file__).parent.parent / "assets" / "emoji"
EMOJI_LAYERS = ("up_blocks.1",)  # where PAG helps it most
_SIZE = 64  # pixels of a tile of pictures.png


def emoji(dtype: torch.dtype = torch.float32) -> Any:
    """The ``StableDiffusionPAGPipeline`` that ships with pag_fast: 320 emoji at 64 × 64.

    Trained from nothing by ``examples/emoji``, 5 M parameters; it knows the captions of
    :func:`emoji_pictures` and mixtures of their words. On the CPU, in ``dtype``.
    """
    from diffusers import StableDiffusionPAGPipeline
    from diffusers.utils import logging

    # its AutoencoderTiny is not the class that diffusers names first, which is worth no warning
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), quiet_loading():
            warnings.simplefilter("ignore")
            return StableDiffusionPAGPipeline.from_pretrained(
                EMOJI, pag_applied_layers=list(EMOJI_LAYERS), **in_dtype(dtype)
            )
    finally:
        logging.set_verbosity(before)


@dataclass(frozen=True)
class Pictures:
    """What a model was trained on: ``images`` (n, 3, H, W) in [0, 1] and their captions."""

    captions: list[str]
    images: torch.Tensor


def emoji_pictures() -> Pictures:
    """The training pictures of :func:`emoji`, rendered from Noto Color Emoji (OFL-1.1)."""
    import numpy
    from PIL import Image

    captions = json.loads((EMOJI / "captions.json").read_text(encoding="utf-8"))
    with Image.open(EMOJI / "pictures.png") as sheet:
        pixels = torch.from_numpy(numpy.array(sheet.convert("RGB")))
    size = _SIZE
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    tiles = pixels.view(rows, size, columns, size, 3).permute(0, 2, 4, 1, 3)
    images = tiles.reshape(-1, 3, size, size)[: len(captions)]
    return Pictures(captions, images.float() / 255)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of that name."""
    return None if name is None else getattr(torch, name)


def in_dtype(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of ``from_pretrained`` by the name that the installed diffusers has for it."""
    import diffusers

    release = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if release >= (0, 40) else "torch_dtype": dtype}


def default_dtype(source: str, device: str | None = None) -> torch.dtype:
    """fp16 on an accelerator; fp32 on the CPU, and for the model that ships with pag_fast."""
    on_cpu = torch.device(device or _device()).type == "cpu"
    return torch.float32 if on_cpu or source == "emoji" else torch.float16


def name_of(source: str) -> str:
    """What to call a source of :func:`load` in a record: of a folder only its name.

    A path says nothing on another machine.
    """
    folder = Path(source)
    return folder.resolve().name if folder.is_dir() else source


def numbered_device(index: int | None) -> str | None:
    """The accelerator of that number, where there are any; None: :func:`load` chooses."""
    kind = _device()
    if index is None or kind == "cpu":
        return None
    return f"{kind}:{index % torch.accelerator.device_count()}"


def load(
    source: str,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    *,
    as_saved: bool = False,
) -> Any:
    """A text-to-image PAG pipeline: ``"emoji"``, a folder or a hub id.

    Args:
        as_saved: the class that was saved, with PAG or without, instead of one with PAG.
        dtype: fp16 on an accelerator and fp32 on the CPU if omitted.
        device: the accelerator if there is one, if omitted.

    Raises:
        ValueError: nothing to load there, or no PAG pipeline for that model in diffusers.
    """
    device = device or _device()
    dtype = dtype or default_dtype(source, device)
    if source == "emoji":
        return emoji(dtype).to(device)
    wanted = "a pipeline" if as_saved else "a text-to-image pipeline with PAG"
    with _sentences(source, f"loaded as {wanted}"), quiet_loading():
        from diffusers import AutoPipelineForText2Image, DiffusionPipeline

        kind = _index(source)["_class_name"]
        # AutoPipeline does not know a class that has PAG already
        has_pag = as_saved or "PAG" in kind
        options = {} if has_pag else {"enable_pag": True}
        cls = DiffusionPipeline if has_pag else AutoPipelineForText2Image
        return cls.from_pretrained(source, **in_dtype(dtype), **options).to(device)


def skeleton(source: str) -> Any:
    """A pipeline without its weights and text encoders: models on the meta device, for counting.

    Args:
        source: the folder of a saved pipeline, of which only configurations are read, or a hub id.

    Raises:
        ValueError: nothing to load there, or no pipeline of diffusers.
    """
    with _sentences(source, "read as a pipeline of diffusers"):
        import diffusers

        config = _index(source)
        cls = getattr(diffusers, config["_class_name"])
        wanted = inspect.signature(cls.__init__).parameters
        for name, parameter in wanted.items():
            required = name != "self" and parameter.default is _OMITTED
            if required and not _is_pair(config.get(name)):
                raise _Damaged(f"its model_index.json says that {name} is {config.get(name)!r}.")
        parts = {name: _part(source, name, config.get(name)) for name in wanted if name != "self"}
        if "requires_safety_checker" in parts:
            parts["requires_safety_checker"] = False
        return cls(**{name: part for name, part in parts.items() if part is not _OMITTED})


class _Damaged(ValueError):
    """A sentence of our own about what was found."""


@contextmanager
def _sentences(source: str, done: str) -> Iterator[None]:
    """Whatever goes wrong inside becomes a ValueError that says what can be given instead."""
    try:
        _check_source(source)
        yield
    except Exception as error:  # damaged files and missing packages raise whatever they raise
        kind = "" if isinstance(error, _Damaged) else f" ({type(error).__name__})"
        raise ValueError(
            f"{source!r} could not be {done}{kind}: {error} "
            'Give "emoji", the folder of a saved pipeline or the id of one on the hub.'
        ) from error


def _check_source(source: str) -> None:
    """Raises where there is no folder, and no such id can be: nobody waits for a network."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not source.strip():  # to Python the folder that it runs in
        raise _Damaged("it names nothing.")
    if Path(source).is_dir():
        return
    if Path(source).exists():
        raise _Damaged("it is a file.")
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise _Damaged("there is no such folder.") from None
    if "/" not in source:
        raise _Damaged("there is no such folder, and an id on the hub is OWNER/NAME.")


def _index(source: str) -> dict[str, Any]:
    """What ``model_index.json`` holds: an object that names a pipeline of diffusers."""
    import diffusers

    config = diffusers.DiffusionPipeline.load_config(source)
    if not isinstance(config, dict):
        raise _Damaged(f"its model_index.json holds a {type(config).__name__}, not an object.")
    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    # a class that lacks a package is no pipeline yet, and says itself which one
    lacks = hasattr(cls, "_backends")
    if not (isinstance(cls, type) and (lacks or issubclass(cls, diffusers.DiffusionPipeline))):
        raise _Damaged(
            f"its model_index.json says that _class_name is {name!r}, which is no pipeline of "
            f"diffusers {diffusers.__version__}."
        )
    return config


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2


_OMITTED = inspect.Parameter.empty


def _part(source: str, name: str, value: Any) -> Any:
    """One component of a pipeline, as ``model_index.json`` names it, or one of its options."""
    import diffusers

    if not _is_pair(value):
        return _OMITTED if value is None else value
    library, kind = value
    if library != "diffusers" or kind is None:
        return None
    cls = getattr(diffusers, kind)
    config = cls.load_config(source, subfolder=name)
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise _Damaged(f"the configuration of its {name} holds a {kind}, not an object.")
    if not issubclass(cls, torch.nn.Module):
        return cls.from_config(config)
    with torch.device("meta"):
        return cls.from_config(config).eval()


def _device() -> str:
    if not torch.accelerator.is_available():
        return "cpu"
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type
