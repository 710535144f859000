"""The road from config to loss is as short as the README says: each file imports the next."""

from pathlib import Path

from tests.test_architecture import ROOT, imported_names


def leads(here, there):
    target = ".".join(Path(there).with_suffix("").parts)
    return target in set(imported_names(ROOT / here))


def test_each_file_of_the_road_imports_the_next():
    assert '"trainer.stages"' in (ROOT / "trainer/__main__.py").read_text()
    assert leads("trainer/stages.py", "trainer/run.py")
    assert leads("trainer/run.py", "trainer/loop.py")
    assert leads("trainer/run.py", "trainer/config/instantiate.py")
    assert "models.architectures.decoder.Decoder" in (ROOT / "conf/model/decoder.yaml").read_text()
    assert leads("models/architectures/decoder.py", "models/loss.py")
