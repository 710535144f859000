"""A source names what it lacks before a run starts."""

from collections.abc import Iterator

import pytest

from trainer.data.sources.base import Local, build_source
from trainer.data.sources.streaming import StreamingSource

HERE = "tests.trainer.data.sources.test_base"


class WithoutFiles(Local):
    """A local source whose author has not written `files`."""

    def documents(self, *args, **settings) -> Iterator[tuple[str, str]]:
        return iter(())


class WithoutOpen(StreamingSource):
    """A streamed source whose author has not written `open`."""

    def identity(self) -> str:
        return "mine"


@pytest.mark.parametrize(("name", "method"), [("WithoutFiles", "files"), ("WithoutOpen", "open")])
def test_a_source_without_a_method_is_refused_by_its_name(name, method):
    with pytest.raises(ValueError, match=rf"data._target_={HERE}.{name} does not define {method};"):
        build_source({"_target_": f"{HERE}.{name}"})
