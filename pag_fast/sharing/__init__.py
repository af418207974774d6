"""Sharing what the branches of a guided step have in common.

``rows`` converts tensors between branch levels inside a model's forward, ``unet_plan`` and
``dit_plan`` know where that can be done safely in each denoiser family, ``plan`` puts both together
for one model.
"""
