"""Every way to change a model whose weights lie together makes of it what it makes of stock's."""

from __future__ import annotations

import pytest
import torch
from joined import UNET, joined, output, wholes  # noqa: F401
from launches import fusion_of
from numerics import relative
from shallow import build
from torch import nn
from torch.nn.utils import parametrize, prune


def _projections(unet):
    return [m for n, m in unet.named_modules() if n.endswith(("attn1.to_k", "time_emb_proj"))]


def _scaled(unet):
    return {key: 0.9 * value for key, value in unet.state_dict().items()}


def _lora(unet):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    names = ["to_q", "to_v", "time_emb_proj"]
    unet.add_adapter(peft.LoraConfig(target_modules=names, init_lora_weights="gaussian"))
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if "lora_B" in name:
                p.normal_()


def _fused_lora(unet):
    _lora(unet)
    unet.fuse_lora(lora_scale=0.7)


def _unloaded_lora(unet):
    _fused_lora(unet)
    unet.unfuse_lora()
    unet.unload_lora()


def _each(change):
    def all_of(unet):
        for module in _projections(unet):
            change(module)

    return all_of


def _replaced(module):
    own = module.forward
    module.forward = lambda x: 1.5 * own(x)


def _one_replaced(unet):
    _replaced(_projections(unet)[0])


def _activations(change):
    def all_of(unet):
        for module in unet.modules():
            if type(module).__name__ == "ResnetBlock2D":
                change(module.nonlinearity)

    return all_of


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class _Loud(nn.Linear):
    def forward(self, x):
        return 1.5 * super().forward(x)


def _subclassed(module):
    module.__class__ = _Loud


def _exchanged(unet):
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    new = nn.Linear(attn.to_k.in_features, attn.to_k.out_features, bias=False)
    with torch.no_grad():
        new.weight.copy_(attn.to_q.weight)
    attn.to_k = new


def _assigned(module):
    module.weight = nn.Parameter(1.5 * module.weight.detach())


def _tied(unet):
    for module in unet.modules():
        if type(module).__name__ == "Attention" and not module.is_cross_attention:
            module.to_k.weight = module.to_q.weight


def _in_place(module):
    with torch.no_grad():
        module.weight.mul_(1.5)


def _transposed(module):
    if module.in_features == module.out_features:
        module.weight.data = module.weight.data.t()


def _hooked(module):
    module.register_forward_hook(lambda m, args, out: 1.5 * out)


def _prehooked(module):
    module.register_forward_pre_hook(lambda m, args: (1.5 * args[0],))


# the change; whether weights lie together afterwards, and whether the picture is another one
CHANGES = {
    "to": (lambda unet: unet.to(torch.float64), True, False),
    "half": (lambda unet: unet.to(torch.bfloat16).to(torch.float32), True, True),
    "share_memory": (lambda unet: unet.share_memory(), False, False),
    "load_state_dict": (lambda unet: unet.load_state_dict(_scaled(unet)), True, True),
    "assign": (lambda unet: unet.load_state_dict(_scaled(unet), assign=True), True, True),
    "lora": (_lora, False, True),
    "fused_lora": (_fused_lora, False, True),
    "unloaded_lora": (_unloaded_lora, True, False),
    "requires_grad": (lambda unet: unet.requires_grad_(False), True, False),
    "forwards": (_each(_replaced), False, True),
    "a_forward": (_one_replaced, True, True),
    "hooks": (_each(_hooked), False, True),
    "pre_hooks": (_each(_prehooked), False, True),
    "activations": (_activations(_replaced), True, True),
    "hooks_of_activations": (_activations(_hooked), True, True),
    "pre_hooks_of_activations": (_activations(_prehooked), True, True),
    "parametrization": (
        _each(lambda m: parametrize.register_parametrization(m, "weight", _Doubled())),
        False,
        True,
    ),
    "prune": (_each(lambda m: prune.l1_unstructured(m, "weight", 0.5)), False, True),
    "subclass": (_each(_subclassed), False, True),
    "exchanged": (_exchanged, True, True),
    "parameters": (_each(_assigned), True, True),
    "transposed": (_each(_transposed), True, True),
    "tied": (_tied, True, True),
    "in_place": (_each(_in_place), True, True),
    "fuse_qkv": (lambda unet: unet.fuse_qkv_projections(), True, False),
    "cpu_offload": (lambda unet: setattr(unet.down_blocks[0], "_hf_hook", object()), False, False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_is_stocks(joined, name):  # noqa: F811
    change, stays, differs = CHANGES[name]
    before = joined.run()
    for unet in (joined.pipe.unet, joined.stock.unet):
        change(unet)
    expected = output(joined.stock.unet)
    assert (relative(expected, before) > 1e-4) is differs
    bound = 1e-6
    for _ in range(3):
        assert relative(joined.run(), expected) < bound
        lying = wholes(joined.pipe.unet)
        # nothing is held in vain
        assert sum(w.tensor.numel() for w in lying) == sum(
            x.packed.weight.numel() + (0 if x.packed.bias is None else x.packed.bias.numel())
            for x in joined.fusion._used
        )
    assert bool(lying) is stays
    joined.fusion.release()
    assert not wholes(joined.pipe.unet)
    assert relative(output(joined.pipe.unet), expected) < 1e-6


def test_weights_that_move_in_every_forward_are_not_run_after(joined):  # noqa: F811
    moved = _projections(joined.pipe.unet)
    entries = []
    for _ in range(3):
        for module in moved:
            module.weight.data = module.weight.data.clone()
        assert relative(joined.run(), output(joined.stock.unet)) < 1e-6
        entries.append(joined.fusion.entries)
        assert not wholes(joined.pipe.unet)
    assert entries[1] is entries[0] and entries[2] is entries[0]
    joined.run()
    assert wholes(joined.pipe.unet)


def test_gradients(joined):  # noqa: F811
    unet, fusion = joined.pipe.unet, joined.fusion
    together = fusion.entries
    places = [p.data_ptr() for p in unet.parameters()]
    with torch.enable_grad():
        assert fusion.refresh() and not joined.members() and fusion.entries
        assert not fusion.refresh()
        unet.requires_grad_(False)
        assert fusion.refresh() and fusion.entries is together
        unet.requires_grad_(True)
        optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
        for model in (unet, joined.stock.unet):
            model.zero_grad()
            x = torch.ones(1, 4, 8, 8)
            model(
                x, 7, encoder_hidden_states=torch.ones(1, 5, 12)
            ).sample.square().mean().backward()
        grads = zip(unet.parameters(), joined.stock.unet.parameters(), strict=True)
        assert all(torch.allclose(a.grad, b.grad) for a, b in grads)
        optimizer.step()
        torch.optim.SGD(joined.stock.unet.parameters(), lr=0.1).step()
    # trained in place: still together, and nothing has moved
    assert relative(joined.run(), output(joined.stock.unet)) < 1e-6
    assert fusion.entries is together
    assert [p.data_ptr() for p in unet.parameters()] == places


def test_joined_in_inference_mode_and_trained_later():
    pipe = build(UNET)
    fusion = fusion_of(pipe.unet)
    with torch.inference_mode():
        assert fusion.refresh() and wholes(pipe.unet)
    assert not any(p.is_inference() or p.data.is_inference() for p in pipe.unet.parameters())
    pipe.unet(
        torch.ones(1, 4, 8, 8), 7, encoder_hidden_states=torch.ones(1, 5, 12)
    ).sample.sum().backward()


def test_autocast_runs_apart(joined):  # noqa: F811
    together = joined.fusion.entries
    with torch.autocast("cpu", torch.bfloat16):
        ours = joined.run()
        assert not joined.members()
        assert relative(ours, output(joined.stock.unet)) < 1e-6
    joined.run()
    assert joined.fusion.entries is together


def test_others_are_not_concerned(joined):  # noqa: F811
    """Who captures what is on the model keeps something that does nothing."""
    unet, kept = joined.pipe.unet, []
    with joined.forward():
        for module in [*_projections(unet), *(m for m in unet.modules() if type(m) is nn.SiLU)]:
            kept.append((module, module.forward))
    for module, forward in kept:
        module.forward = forward
    expected = output(joined.stock.unet)
    assert relative(output(unet), expected) < 1e-6
    assert relative(joined.run(), expected) < 1e-6
