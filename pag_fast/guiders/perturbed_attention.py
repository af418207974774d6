"""Perturbed-Attention Guidance as a guider of modular pipelines."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders import PerturbedAttentionGuidance as _Stock
from diffusers.hooks import LayerSkipConfig
from torch import nn

from ..models.traced.description import derive
from ..ops import check_backend
from ..settings.layers import as_list
from ..sharing.resume import known_modules
from ..sharing.rows import BranchState
from .base import ResumedGuidance
from .changes import Perturbed
from .derived import DerivedResumption
from .resumption import Resumption
from .selection import as_configs, perturbed_attentions, saved


class PerturbedAttentionGuidance(ResumedGuidance, _Stock):
    """A drop-in for ``diffusers.PerturbedAttentionGuidance`` (PAG, arXiv 2403.17377).

    The pass ``pred_cond_skip`` begins at the first perturbed layer, from what the pass
    ``pred_cond`` had there, and projects no queries and keys for the identity. It perturbs as the
    PAG pipelines do: in joint attention an image query sees itself and the text, and text queries
    are not perturbed.

    Arguments that diffusers' class has not, or takes in another way:

    Args:
        perturbed_guidance_start: as in diffusers, whose window is
            ``int(start·n) < step < int(stop·n)`` for n steps. But with a start of 0 step 0 is
            perturbed too, and a window that holds no whole step perturbs one and says so.
        perturbed_guidance_stop: where that window ends.
        perturbed_guidance_layers: one or several of everything that :func:`pag_fast.patch` takes:
            indices of blocks, names such as ``"mid"`` or ``"blocks.13"``, regular expressions,
            ComfyUI's ``"d2.0"``. By default the middle of the model.
        perturbed_guidance_config: ``LayerSkipConfig`` or dictionaries, instead of layers.
        exact_layers: names match whole components: ``"blocks.1"`` is not ``"blocks.10"``.
        backend: of attention, ``"auto"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: arguments that do not fit together; in a pass, layers or a denoiser that cannot
            be perturbed.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        perturbed_guidance_scale: float = 2.8,
        perturbed_guidance_start: float = 0.01,
        perturbed_guidance_stop: float = 0.2,
        perturbed_guidance_layers: int | str | list[int | str] | None = None,
        perturbed_guidance_config: LayerSkipConfig
        | list[LayerSkipConfig]
        | dict[str, Any]
        | None = None,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        exact_layers: bool = False,
        backend: str = "auto",
    ) -> None:
        if perturbed_guidance_layers is not None and perturbed_guidance_config is not None:
            raise ValueError(
                "perturbed_guidance_layers and perturbed_guidance_config both name layers: choose "
                "one."
            )
        check_backend(backend)
        # diffusers' own constructor would register other arguments
        BaseGuidance.__init__(self, start, stop, enabled)
        self._begin(
            guidance_scale,
            perturbed_guidance_scale,
            perturbed_guidance_start,
            perturbed_guidance_stop,
            guidance_rescale,
            use_original_formulation,
        )
        self.layers = None
        if perturbed_guidance_layers is not None:
            self.layers = as_list(perturbed_guidance_layers)
        self.exact_layers = exact_layers
        self.backend = backend
        self.skip_layer_config: list[LayerSkipConfig] = []
        if perturbed_guidance_config is not None:
            scores = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
            # only the layers are of interest, whatever else the configuration says
            given = saved(perturbed_guidance_config)
            given = given if isinstance(given, list) else [given]
            plain = [{**c, **scores} if isinstance(c, dict) else c for c in given]
            self.skip_layer_config = as_configs(plain, "perturbed_guidance_config")
            self.register_to_config(perturbed_guidance_config=saved(self.skip_layer_config))

    def _make(self, model: nn.Module) -> Resumption:
        family = derive(model)
        attentions = perturbed_attentions(
            model, self.layers, self.skip_layer_config, exact=self.exact_layers
        )
        known = known_modules(model, family.plan(model, set(attentions), merge=False))
        state = BranchState()
        perturbed = Perturbed(state, model, attentions, self.backend)
        modules = {**{item.name: item.module for item in known}, **attentions}
        if family.is_derived:
            return DerivedResumption(model, state, known, perturbed, modules)
        return Resumption(state, known, perturbed.changes, modules, perturbed.prepare)
