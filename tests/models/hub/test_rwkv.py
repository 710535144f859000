"""RWKV-7 against fla's own model on the CPU, where plain torch forms of its kernels stand in."""

import copy
import inspect
import json
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from models.hub.registry import adapter_of
from models.micro_batch import MicroBatch
from models.recurrent.rwkv_layers import HeadNorm
from tests.support import hub
from tests.support.parity import relative
from tests.support.pool import ranks
from trainer.export_huggingface import translated
from trainer.init_from.huggingface import read_config
from trainer.init_from.sources import open_weights

CLOSE = 1e-5
SMALL_RWKV7 = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "decay_low_rank_dim": 5,
    "gate_low_rank_dim": 7,
    "a_low_rank_dim": 6,
    "v_low_rank_dim": 4,
    "vocab_size": hub.WORDS,
    "fuse_norm": False,
}


@cache
def reference():
    """Returns fla's reference of the generalised delta rule with float64 in place of float32."""
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    source = inspect.getsource(dplr_recurrence).replace(".float()", ".double()")
    found = dict(dplr_recurrence.__globals__)
    exec(source, found)
    return found["dplr_recurrence"]


def recurrence(r, w, k, v, a, b):
    """The recurrence of fla's reference, all [B, T, H, D]."""
    first = [x.transpose(1, 2).double() for x in (r, k, v, a, b, w)]
    # Its queries come out divided by the root of their width.
    output, _ = reference()(first[0] * r.shape[-1] ** 0.5, *first[1:])
    return output.transpose(1, 2).to(r.dtype)


# fla compiles some of the plain forms, which takes longer than all the rest.
UNCOMPILED = torch._dynamo.config.patch(disable=True)


def plain_kernels(patch):
    """Puts fla's references, or plain torch, in the place of its Triton kernels."""
    from fla.layers import rwkv7 as layer
    from fla.models.rwkv7 import modeling_rwkv7 as model
    from fla.modules.token_shift import token_shift_ref
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref

    def shift(x, cu_seqlens=None, output_cache=False, cache=None):
        return token_shift_ref(x), None

    def chunk(r, w, k, v, a, b, **settings):
        return recurrence(r, w, k, v, a, b), None

    def fused(r, w, k, v, kk, a, **settings):
        return recurrence(r, w, k, v, -kk, kk * a), None

    for home in (layer, model):
        patch.setattr(home, "token_shift", shift)
    patch.setattr(layer, "fused_addcmul_rwkv7", torch_addcmul_rwkv7)
    patch.setattr(layer, "fused_k_rwkv7", k_update_ref)
    patch.setattr(layer, "gate_output_correction", gate_output_correction_ref)
    patch.setattr(layer, "chunk_rwkv7", chunk)
    patch.setattr(layer, "fused_mul_recurrent_rwkv7", fused)
    patch.setattr(layer, "l2_norm", lambda x: x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt())


def theirs_in(folder):
    """A random model of fla in float64, saved as it saves itself."""
    from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM

    torch.manual_seed(7)
    config = RWKV7Config(**SMALL_RWKV7)
    model = RWKV7ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # Every key that fla's config has of its own, with its value.
    own = inspect.signature(RWKV7Config.__init__).parameters
    content = {key: getattr(config, key) for key in own if hasattr(config, key)}
    content |= {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(content))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return model.double().eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, the model of fla, ours)."""
    folder = tmp_path_factory.mktemp("rwkv7")
    with pytest.MonkeyPatch.context() as patch, UNCOMPILED:
        plain_kernels(patch)
        yield folder, theirs_in(folder), hub.ours(folder)


def test_packed_documents_give_the_logits_losses_and_gradients_of_fla(made):
    folder, theirs, ours = made
    tokens, span, targets = hub.rows()
    logits = ours(MicroBatch(tokens, span)).detach()
    theirs.zero_grad()
    total = 0.0
    for row, here, document in hub.documents():
        want = theirs(document, use_cache=False, return_dict=True).logits
        assert relative(logits[row : row + 1, here], want.detach()) < CLOSE
        if document.shape[1] > 1:
            loss = F.cross_entropy(want[0, :-1], document[0, 1:], reduction="sum")
            loss.backward()
            total += loss.item()
    ours.zero_grad()
    losses = ours(MicroBatch(tokens, span, targets))
    losses.sum().backward()
    assert losses.sum().item() == pytest.approx(total, rel=CLOSE)
    want = {}
    given = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for piece in adapter_of(read_config(folder)).pieces(read_config(folder)):
        parts = piece.read([given[name] for name in piece.theirs])
        want.update(zip(piece.ours, parts, strict=True))
    assert hub.worst(hub.gradients(ours), want) < CLOSE


@pytest.mark.full
def test_thirty_steps_equal_those_by_hand(tmp_path):
    with pytest.MonkeyPatch.context() as patch, UNCOMPILED:
        plain_kernels(patch)
        theirs = theirs_in(tmp_path).train()
        losses, wanted = hub.thirty_steps(tmp_path, theirs)
    assert losses[-1] < losses[0] - 0.3
    torch.testing.assert_close(losses, wanted, rtol=1e-6, atol=0)


def test_the_fused_norm_of_directions_adds_to_their_square(made, tmp_path):
    """With fuse_norm=true fla computes another unit vector; short directions show it."""
    folder, theirs, _ = made
    content = {**read_config(folder), "fuse_norm": True}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    attention = copy.deepcopy(theirs.model.layers[0].attn)
    with torch.no_grad():
        attention.k_k.mul_(1e-3)
    ours = hub.blank(tmp_path).blocks[0].mixer.to_empty(device="cpu").double()
    for piece in adapter_of(content).pieces(content):
        if piece.ours[0].startswith("blocks.0.mixer."):
            leaves = [name.removeprefix("model.layers.0.attn.") for name in piece.theirs]
            given = [attention.get_parameter(leaf) for leaf in leaves]
            ours.get_parameter(piece.ours[0].removeprefix("blocks.0.mixer.")).data = piece.read(
                given
            )[0]
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    norm = HeadNorm(attention.num_heads, 32, eps=attention.g_norm.eps).double()
    norm.load_state_dict(attention.g_norm.state_dict())
    plain = attention(x)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "fuse_norm", True)
        patch.setitem(attention._modules, "g_norm", norm)
        fused = attention(x)[0]
    _, span, _ = hub.rows()
    got = ours(x, span.map(lambda addresses: addresses[:1, :9]))
    assert relative(got, fused) < CLOSE < relative(plain, fused)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_share_a_row_give_the_same(size, made):
    folder, _, ours = made
    tokens, span, targets = hub.rows()
    ours.zero_grad()
    loss = ours(MicroBatch(tokens, span, targets)).sum() / (targets >= 0).sum()
    loss.backward()
    want = hub.gradients(ours)
    for got, gradients in ranks(size, hub.on_ranks, str(folder), "ring"):
        assert got == pytest.approx(loss.item(), rel=1e-9)
        assert hub.worst(gradients, want) < 1e-8


def test_every_tensor_and_every_key_comes_back(made):
    folder, _, _ = made
    content = read_config(folder)
    source = open_weights(f"hf:{folder}")
    seen = set()
    for piece in adapter_of(content).pieces(content):
        back = piece.write([source.read(name) for name in piece.ours])
        for name, tensor in zip(piece.theirs, back, strict=True):
            assert torch.equal(tensor, source.read_theirs(name))
            seen.add(name)
    assert seen == set(source.files)
    adapter, written = translated(hub.config_of(folder), hub.WORDS, content)
    assert adapter.model_type == "rwkv7"
    for key, value in content.items():
        assert written.get(key, value) == value, key
    assert adapter.architecture(written).model == adapter.architecture(content).model
