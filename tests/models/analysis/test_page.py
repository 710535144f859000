"""The attention page holds every head and no markup from the data; rollout and norms are exact."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from models.analysis.attention_maps import collect, leaves
from models.analysis.page import attention_page
from models.analysis.rollout import rollout, weighted_by_values
from models.attention.full import Attention
from models.positions.rope import Rope
from models.span import Span

TEXTS = ["</script>", "<b>", "&", "a", "<!--", "b"]


class TwoLayers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(10, 16)
        self.layers = torch.nn.ModuleList(Attention(16, 4, 2, Rope()) for _ in range(2))

    def forward(self, batch):
        tokens, span, *_ = batch
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden, span)
        return hidden


@pytest.fixture(scope="module")
def maps():
    model = TwoLayers().double()
    span = Span.line(1, len(TEXTS))
    return model, collect(model, leaves(model), torch.arange(len(TEXTS))[None], span, norms=True)


def test_text_of_the_data_never_becomes_markup(maps):
    page = attention_page("a <title>", maps[1], TEXTS, ["scan <x>"])
    assert page.count("</script>") == 2 and "<b>" not in page and "<!--" not in page
    assert "a &lt;title&gt;" in page and "scan &lt;x&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["tokens"] == TEXTS and len(data["layers"]) == 2
    head = data["layers"][1]["heads"][3]
    packed = np.frombuffer(base64.b64decode(head["maps"]["weights"]), np.uint8).reshape(6, 6)
    assert np.abs(packed / 255 - maps[1][1].weight[3].numpy()).max() <= 0.5 / 255
    assert set(head["maps"]) == {"weights", "weights x value norms"} and "innerHTML" not in page


def test_rollout_is_the_product_of_mixed_mean_maps(maps):
    flows = rollout(maps[1])
    expected = torch.eye(6, dtype=torch.float64)
    for attention, flow in zip(maps[1], flows, strict=True):
        layer = 0.5 * torch.eye(6, dtype=torch.float64) + 0.5 * attention.weight.mean(0)
        expected = layer @ expected
        torch.testing.assert_close(flow, expected)
        torch.testing.assert_close(flow.sum(1), torch.ones(6, dtype=torch.float64))
    assert flows[1].triu(1).abs().max() == 0


def test_norms_are_those_of_what_a_key_adds(maps):
    model, found = maps
    layer = model.layers[0]
    with torch.no_grad():
        hidden = model.embed(torch.arange(6)[None])
        value = layer.project_payload(hidden)[1][0]
        for head in range(4):
            own = torch.zeros(6, 16, dtype=torch.float64)
            own[:, 4 * head : 4 * head + 4] = value[:, head // 2]
            torch.testing.assert_close(found[0].value_norm[head], layer.out(own).norm(dim=-1))
    weighted = weighted_by_values(found[0])
    product = found[0].weight * found[0].value_norm[:, None]
    torch.testing.assert_close(weighted, product / product.sum(-1, keepdim=True))
