"""The weights of a recorded run, without its method: what was written is replayed, and nothing is computed."""

from __future__ import annotations

from fastedit.methods.registry import METHODS
from fastedit.model.adapter import ModelAdapter
from fastedit.runs.identity import check_model, compare_machine
from fastedit.runs.recorder import Recorder
from fastedit.weights.editable import ColumnWeights, EditableWeights


def recorded_weights(recorder: Recorder, adapter: ModelAdapter | None = None) -> EditableWeights:
    """The weights of a run, with its batches in force written into the model. Serves runs of any method.

    adapter: the unedited model; default: loaded from where the run says it was
    Raises WrongModel for another model, DamagedRun, RunError for a model that was handed over loaded."""
    model = adapter or recorder.load_model()
    layers = sorted(map(int, recorder.header["model"]["edited"]))
    method = METHODS.get(recorder.method_name)

    # Of a method of the user's own nothing is known; whole originals serve every method, at the cost of their memory.
    by_column = method is not None and method.by_column
    weights = ColumnWeights(model, layers) if by_column else EditableWeights(model, layers)
    check_model(recorder.header, model, weights)
    compare_machine(recorder.header)
    recorder.verify()

    with weights.writing():
        recorder.replay_weights(weights)
    return weights
