"""Criteria: which weights matter?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("magnitude", "magnitude:Magnitude", "keep the largest absolute values"),
        ("random", "random:Random", "keep a random choice, the same on every rank"),
        ("gradient", "gradients:Gradient", "keep (or grow) the largest gradients"),
        ("taylor", "gradients:Taylor", "keep what would change the loss most, to first order"),
        ("snip", "gradients:Snip", "the same before the first step"),
        ("momentum", "gradients:Momentum", "keep (or grow) the largest running means of the gradient"),
        ("lamp", "lamp:Lamp", "magnitudes that compare over layers"),
        ("movement", "movement:Movement", "learned scores: keep what moves away from zero"),
        ("soft_movement", "movement:SoftMovement", "the same with a penalty, compared over layers"),
        ("sr_ste", "sr_ste:SrSte", "magnitudes, masked weights alive and decaying: for N:M"),
        ("l0", "l0:L0", "learned gates, held at the sparsity by a Lagrangian"),
        ("obs", "obs:Obs", "what the loss would lose, to second order"),
        ("wanda", "calibrated:Wanda", "magnitude times the size of the input"),
        ("sparsegpt", "calibrated:SparseGpt", "what the layer would lose if the other weights make up for it"),
        ("influence", "calibrated:Influence", "keep the blocks that change their input most"),
    ):
        registry.add(Component("criterion", name, f"sparsehooks.builtin.criteria.{target}", summary))
