"""The HTML pages in a real browser without a network: no console error, text stays text."""

import re

import pytest
import torch

from models.analysis.attention_maps import collect, leaves
from models.analysis.page import attention_page
from models.analysis.state_maps import collect_states
from models.attention.full import Attention
from models.init import initialise
from models.positions.rope import Rope
from models.primitives.scan import Scan
from models.recurrent.delta import GatedDeltaNet
from models.span import Span
from tests.support.browser import CHROMIUM, opened
from tests.support.run_folders import sweep
from trainer.reports.page import write

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is no Python package; apt installs it"),
]
TEXTS = ["</script>", "<img src=x onerror=console.error(1)>", "&", "a", "<!--", "b"]
# Hovers over the first map and clicks on it, then over the first strip of a state.
USE = """
const at = (element, kind) => {
  const box = element.getBoundingClientRect();
  const place = {clientX: box.left + 1, clientY: box.bottom - 1, bubbles: true};
  element.dispatchEvent(new MouseEvent(kind, place));
};
const note = canvas => canvas.closest("figure").querySelector("figcaption").textContent;
const said = [];
const map = document.querySelector("canvas");
at(map, "mousemove");
said.push(note(map));
at(map, "click");
said.push(document.querySelectorAll("#detail line").length > 0 ? "lines" : "no lines");
const mode = document.getElementById("mode");
for (const option of [...mode.options]) {
  mode.value = option.value;
  mode.dispatchEvent(new Event("change"));
  said.push(option.value + ": " + document.querySelectorAll("#heads canvas").length);
  const strip = document.querySelector("canvas.strip");
  if (strip) { at(strip, "mousemove"); said.push(note(strip)); }
}
document.title = said.join(" | ");
"""


class TwoLayers(torch.nn.Module):
    """Embeds tokens, then softmax attention and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(10, 16)
        self.mixers = torch.nn.ModuleList([Attention(16, 4, 2, Rope()), GatedDeltaNet(16, 2)])

    def forward(self, batch):
        hidden = self.embed(batch.tokens)
        for mixer in self.mixers:
            hidden = hidden + mixer(hidden, batch.span)
        return hidden


def test_the_attention_page_works_without_a_network_and_shows_text_as_text(tmp_path) -> None:
    model = initialise(TwoLayers(), 0).double()
    tokens = torch.arange(len(TEXTS))[None]
    span = Span.line(1, len(TEXTS))
    maps = collect(model, leaves(model), tokens, span, norms=True)
    states = collect_states(model, leaves(model, (Scan,)), tokens, span)
    page = tmp_path / "attention.html"
    page.write_text(attention_page("a page", maps, TEXTS, [], (), states))
    found = opened(page, tmp_path, USE)
    assert found.messages == []
    said = re.search("<title>(.*?)</title>", found.dom, re.DOTALL)[1].split(" | ")
    weight = float(maps[0].weight[0, 5, 0])
    assert said[0] == f"b \u2192 &lt;/script&gt;: {round(weight * 255) / 255:.3f}"
    assert said[1:5] == ["lines", "weights: 4", "weights x value norms: 4", "reads of the state: 8"]
    assert said[5] == f"&lt;/script&gt;: kept {round(float(states[0].kept[0, 0]), 4):.3f}"
    assert said[6] == "rollout: 1"
    assert "<img" not in found.dom and "<th>half-life</th>" in found.dom


def test_the_report_of_a_sweep_opens_without_a_network(tmp_path) -> None:
    sweep(tmp_path / "sweep")
    found = opened(write(tmp_path / "sweep"), tmp_path)
    assert found.messages == [] and "<h2>Variants</h2>" in found.dom


def test_an_error_of_a_page_is_seen(tmp_path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><html><body><script>missing();</script></body></html>")
    [message] = opened(page, tmp_path).messages
    assert "missing is not defined" in message
