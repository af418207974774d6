"""Pipelines without PAG in miniature, and PAG added to them the slow and obvious way.

``slow_pag`` runs the denoiser once more on the cond rows, with a dense mask in every perturbed
layer, and shares no code with the package but the names of layers. A pipeline is an entry in one of
``unets.py``, ``images.py`` and ``videos.py``.
"""

from tiny_hosts.images import flux, lumina2, qwen
from tiny_hosts.pipelines import HOSTS, SWEPT, build, call_kwargs, latents
from tiny_hosts.reference import inspect_parameters, perturbing, rows_of, slow_pag, text_and_image
from tiny_hosts.spec import TEXT, HostSpec
from tiny_hosts.videos import cogvideox, hunyuan_video, ltx, wan

__all__ = [
    "HOSTS",
    "SWEPT",
    "TEXT",
    "HostSpec",
    "build",
    "call_kwargs",
    "cogvideox",
    "flux",
    "hunyuan_video",
    "inspect_parameters",
    "latents",
    "ltx",
    "lumina2",
    "perturbing",
    "qwen",
    "rows_of",
    "slow_pag",
    "text_and_image",
    "wan",
]
