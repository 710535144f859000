"""peft reads our adapters and we read its own: the same losses."""

import peft
import pytest
import torch

from models.micro_batch import MicroBatch
from tests.trainer.init_from.test_adapters import LORA, TARGETS, built, run_on
from tests.trainer.test_stages import SMALL
from trainer.export import export, reopen
from trainer.init_from.adapters import export_adapter, read_adapter
from trainer.verify.whole_runs import write_documents


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("peft")
    glob = write_documents(folder / "text")
    data = ("data=files", f"data.path={glob}", f"data.cache={folder / 'cache'}")
    sizes = ("context_length=62", "batch_tokens=124", "steps=3", "evaluation.every=0")
    return [*SMALL, *data, *sizes, "optim.learning_rate=0.05"]


def loss_of(model, stream) -> float:
    batch, _ = stream.read(stream.start())
    return model(MicroBatch(batch.inputs(), batch.span(), batch.targets())).sum().item()


def test_peft_computes_with_our_adapters_what_our_export_does(words, tmp_path):
    run_on(1, [*words, *LORA], tmp_path / "run")
    export(tmp_path / "run", tmp_path / "exported")
    export_adapter(tmp_path / "run", tmp_path / "adapter")
    _, stream, base = built(words)
    plain = loss_of(base, stream)
    right = loss_of(reopen(tmp_path / "exported"), stream)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert abs(loss_of(theirs, stream) / right - 1) < 1e-12
    assert abs(plain / right - 1) > 1e-4


def test_we_compute_with_an_adapter_of_peft_what_it_does(words, tmp_path):
    _, stream, base = built(words)
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS)
    theirs = peft.get_peft_model(base, settings)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(str(tmp_path))
    _, _, ours = built([*words, *LORA])
    missing, unexpected = ours.load_state_dict(dict(read_adapter(tmp_path)), strict=False)
    assert not unexpected
    assert not [name for name in missing if "lora" in name]
    assert abs(loss_of(ours, stream) / loss_of(theirs, stream) - 1) < 1e-12
