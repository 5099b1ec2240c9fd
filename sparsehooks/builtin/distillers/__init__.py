"""Distillers: what does the teacher teach?"""

from __future__ import annotations

from sparsehooks import Component, Registry, hookimpl


@hookimpl
def register_components(registry: Registry) -> None:
    """Offer them."""
    for name, target, summary in (
        ("kl", "logits:KL", "the distribution of the outputs (Hinton et al. 2015)"),
        ("reverse_kl", "logits:ReverseKL", "where the student puts weight on the outputs (Gu et al. 2024)"),
        ("jsd", "logits:JSD", "a divergence between kl and reverse_kl (Agarwal et al. 2024, GKD)"),
        ("dkd", "logits:DKD", "target class and the others apart (Zhao et al. 2022)"),
        ("hidden", "hidden:Hidden", "the hidden states (Romero et al. 2015)"),
        ("cosine", "hidden:Cosine", "the direction of the last hidden states (Sanh et al. 2019, DistilBERT)"),
        ("attention", "attention:Attention", "where the attention looks (Jiao et al. 2020, TinyBERT)"),
        ("relation", "relation:Relation", "how queries, keys and values relate (Wang et al. 2021, MiniLM)"),
        ("contrastive", "contrastive:Contrastive", "which sentence of the batch it is (Tian et al. 2020)"),
    ):
        registry.add(Component("distiller", name, f"sparsehooks.builtin.distillers.{target}", summary))
