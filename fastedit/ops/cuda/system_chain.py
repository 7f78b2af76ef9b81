"""The chain of capture_keys, select_neurons and masked_gram, in three launches or in one; the host waits for nothing.

One cooperative launch saves two launches, but its blocks have to meet at barriers of the whole grid. No GPU has timed
the two forms against each other yet, so the three launches are used.
"""

from __future__ import annotations

from torch import Tensor

from fastedit.ops import cuda
from fastedit.ops._check import apart
from fastedit.ops.cuda import capture_keys, masked_gram, select_neurons
from fastedit.ops.system_chain import Chain, SystemChain


def supports(args: SystemChain) -> str | None:
    """Rows as for capture_keys; second moment, history and past keys float32, on the same CUDA device."""
    return apart(args) or capture_keys.supports(args.capture()) or cuda.cannot(args.moment, args.history, args.past)


def worth(args: SystemChain) -> str | None:
    """No GPU has timed it yet."""
    return cuda.unmeasured()


def system_chain(args: SystemChain) -> Chain:
    """See :func:`fastedit.ops.system_chain.system_chain`."""
    return one_launch(args) if not_in_one_launch(args) is None else three_launches(args)


def not_in_one_launch(args: SystemChain) -> str | None:
    """Why the chain does not run in one launch; None if it can and is faster so."""
    if not all(_wide(rows) for rows in (args.gate, args.up) if rows is not None):
        return "the chain in one launch reads rows 16 bytes at a time, these are not aligned for it"
    return cuda.unmeasured()


def three_launches(args: SystemChain) -> Chain:
    """The kernels of the three ops, the number of neurons passed on in device memory."""
    rows = capture_keys.ready(args.capture())
    keys, mass = capture_keys.capture_keys(rows)
    index, status = select_neurons.select_on_device(args.selection(mass))
    system = masked_gram.masked_gram_on_device(args.system(keys, index), status, args.past, rows.active)
    return Chain(keys, mass, index, status, system)


def one_launch(args: SystemChain) -> Chain:
    """One cooperative launch, for rows that can be read 16 bytes at a time."""
    rows = capture_keys.ready(args.capture())
    keys = capture_keys.empty(rows.gate)
    selection = args.selection(keys.mass)
    index, status = select_neurons.empty(keys.mass)
    system = args.system(keys.keys, index)
    out = masked_gram.empty(system)

    if rows.gate.shape[2] == 0:
        return Chain(*keys, index, status.zero_(), out.view(-1))
    cuda.launch(
        "system_chain",
        rows.gate,
        capture_keys.task(rows, keys),
        select_neurons.task(selection, index, status),
        masked_gram.task(system, out, status, args.past, rows.active),
    )
    return Chain(*keys, index, status, out.view(-1))


def _wide(rows: Tensor) -> bool:
    aligned = rows.data_ptr() % 16 == 0 and rows.stride(2) == 1
    return aligned and all(stride * rows.element_size() % 16 == 0 for stride in rows.stride()[:2])
