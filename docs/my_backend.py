# my_backend.py
from torch.nn.functional import linear

from sparsehooks import Backend, Component, Support, hookimpl


class Rows(Backend):
    def supports(self, layer, device):
        empty = (layer.weight == 0).all(dim=1).any()
        return Support(ok=True) if empty else Support(ok=False, reason="each row has a weight that is not zero")

    def pack(self, layer):
        kept = (layer.weight != 0).any(dim=1).nonzero().flatten()
        bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
        return kept, layer.weight.detach()[kept], bias[kept], bias.clone()

    def run(self, packed, input):
        kept, weight, bias, everywhere = packed
        outputs = everywhere.expand(*input.shape[:-1], -1).clone()
        outputs[..., kept] = linear(input, weight, bias)
        return outputs


@hookimpl
def register_components(registry):
    registry.add(Component("backend", "rows", Rows, "rows of weights that are all zero are left out"))
