"""How far a run log has come, beside it: without this, a lost last record together with its line leaves a shorter log
in which nothing is wrong."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from fastedit.runtime.hashing import canonical

HEAD = "head.json"


@dataclass(frozen=True)
class Head:
    """What the head file of a run says.

    records: how many were written; chain: hash over all of them
    """

    records: int
    chain: str

    @property
    def payload(self) -> bytes:
        """The bytes of its file."""
        data = {"records": self.records, "chain": self.chain}
        return canonical({**data, "sha256": _digest(data)}).encode("ascii") + b"\n"

    @classmethod
    def parse(cls, payload: bytes) -> Head | None:
        """What such bytes say; None when they are not what was written."""
        try:
            data = json.loads(payload)
            head = cls(data["records"], data["chain"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return head if head.payload == payload and head.records > 0 else None


def _digest(data: dict[str, object]) -> str:
    return hashlib.sha256(canonical(data).encode()).hexdigest()
