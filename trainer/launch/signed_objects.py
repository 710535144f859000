"""Signs the objects that ranks send one another with the run's secret, and checks them.

torch's collectives of objects (checkpoints are planned with them) send pickles, and opening a
pickle may run whatever it names. Sockets between ranks ask nobody for a password. So that a
stranger who gets hold of one runs no code here, every pickle carries a signature that only
processes of this run can make. Tensors are not signed: they run no code.
"""

import hashlib
import hmac
import io
import pickle
from typing import Any

from torch.distributed import distributed_c10d

from trainer.launch.nodes import NoMeeting

DIGEST = hashlib.sha256


class Signer:
    """Writes objects as torch's pickler does, each with a signature in front."""

    secret = b""

    def __init__(self, stream: Any):
        self.stream = stream

    def dump(self, value: Any) -> None:
        """Writes one object."""
        content = io.BytesIO()
        pickle.Pickler(content).dump(value)
        body = content.getvalue()
        self.stream.write(hmac.digest(self.secret, body, DIGEST) + body)


class Checker:
    """Reads objects that a Signer wrote."""

    secret = b""

    def __init__(self, stream: Any):
        self.stream = stream

    def load(self) -> Any:
        """Returns the next object.

        Raises:
            NoMeeting: no rank of this run wrote it; nothing of it was opened.
        """
        size = DIGEST().digest_size
        signature = self.stream.read(size)
        body = self.stream.read()
        if not hmac.compare_digest(signature, hmac.digest(self.secret, body, DIGEST)):
            raise NoMeeting(
                "an object came that no rank of this run has signed: somebody else sends to its"
                " ports, or the machines have different secrets; use a network that nobody else"
                " reaches, and one run_dir that all machines see"
            )
        return pickle.loads(body)


def sign_objects(secret: str) -> None:
    """Signs objects to and from other ranks from now on.

    Every rank calls this before the process group exists.

    Raises:
        NoMeeting: this torch has no place to do that.
    """
    for name in ("_pickler", "_unpickler"):
        if not hasattr(distributed_c10d, name):
            raise NoMeeting(
                f"torch.distributed has no {name} any more, so objects could not be signed; use an"
                " older torch"
            )
    key = secret.encode()
    distributed_c10d._pickler = type("SignerOfRun", (Signer,), {"secret": key})  # pyright: ignore[reportAttributeAccessIssue]
    distributed_c10d._unpickler = type("CheckerOfRun", (Checker,), {"secret": key})  # pyright: ignore[reportAttributeAccessIssue]
