"""States of recurrent layers: the reads rebuild the output; documents do not reach each other."""

import json
import re

import pytest
import torch

from models.analysis.attention_maps import hooked, leaves
from models.analysis.page import READS, attention_page
from models.analysis.state_maps import collect_states
from models.init import initialise
from models.primitives.scan import Scan
from models.span import PADDING, Span
from tests.variants import VARIANTS, WIDTH

NAMES = ("gated_delta", "delta", "rwkv7", "rwkv6", "mamba2", "retention", "gated_linear", "linear")
CORRECTING = ("gated_delta", "delta", "rwkv7")
DOCUMENTS = [0] * 5 + [1] * 3 + [PADDING] * 2
TEXTS = ["</script>", "<b>", "a", "b", "c", "a", "b", "c"]


class OneLayer(torch.nn.Module):
    """Embeds tokens and runs one recurrent layer."""

    def __init__(self, name: str):
        super().__init__()
        self.embed = torch.nn.Embedding(10, WIDTH)
        self.mixer = VARIANTS[name]()

    def forward(self, batch):
        return self.mixer(self.embed(batch.tokens), batch.span)


def collected(name: str):
    """(map, query, payload, output of the scan) of one row of two documents and padding."""
    model = initialise(OneLayer(name), 3).double().eval()
    position = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 0]])
    span = Span.of(position, torch.tensor([DOCUMENTS]))
    tokens = torch.arange(10)[None]
    scans = leaves(model, (Scan,))
    seen = []

    def note(_, query, payload, *args, **rest):
        [scan] = scans.values()
        seen.append((query, payload, scan.recur(query, payload, span=rest["span"])[0]))

    with torch.no_grad(), hooked(scans, note):
        [found] = collect_states(model, scans, tokens, span)
    [(query, payload, output)] = seen
    return found, query, payload, output


@pytest.mark.parametrize("name", NAMES)
def test_the_reads_times_the_values_are_the_output(name: str) -> None:
    found, _, payload, output = collected(name)
    value = payload[1][0, :8]
    rebuilt = torch.einsum("hts,she->the", found.reads, value)
    torch.testing.assert_close(rebuilt, output[0, :8], rtol=1e-9, atol=1e-12)
    assert not found.reads.triu(1).any()
    # The second document begins from an empty state.
    assert not found.reads[:, 5:, :5].any() and found.reads[:, 6:8, 5].any()
    shares = found.shares().weight.sum(-1)
    assert ((shares - 1).abs() < 1e-9).logical_or(shares == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_written_and_corrected_is_that_of_each_token(name: str) -> None:
    found, _, (key, value, decay, *correction), _ = collected(name)
    assert found.kept.shape == found.written.shape == (found.heads, 8)
    for token in (0, 4, 7):
        for head in range(found.heads):
            own_key = key[0, token, head % key.shape[2]]
            update = own_key[:, None] * value[0, token, head][None]
            torch.testing.assert_close(found.written[head, token], update.norm())
            kept = decay[0, token, head % decay.shape[2]].exp().mean()
            torch.testing.assert_close(found.kept[head, token], kept)
            if correction:
                look, change = (part[0, token, head] for part in correction)
                taken = torch.outer(change, look).norm()
                torch.testing.assert_close(found.corrected[head, token], taken)
    assert (found.corrected is not None) == (name in CORRECTING)
    assert (found.kept <= 1).all() and (found.kept > 0).all()


def test_the_page_shows_states_and_no_markup_of_the_data() -> None:
    found, *_ = collected("gated_delta")
    page = attention_page("states", [], TEXTS, [], (), [found])
    assert page.count("</script>") == 2 and "<b>" not in page
    assert "no weights of the row's tokens" not in page and "half-life is that" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    [layer] = data["layers"]
    head = layer["heads"][0]
    assert set(head["maps"]) == {READS} and layer["rollout"] is None
    assert set(head["tracks"]) == {"kept", "written", "corrected"}
    assert head["tracks"]["kept"] == [round(value, 4) for value in found.kept[0].tolist()]
    decay = found.kept[0].log().mean().exp()
    assert abs(float(decay) ** head["half_life"] - 0.5) < 1e-6


def test_states_of_another_row_are_named_as_without_a_map() -> None:
    found, *_ = collected("linear")
    page = attention_page("states", [], TEXTS[:5], [], (), [found])
    assert "have no weights of the row's tokens, and so no map: mixer.mix" in page
