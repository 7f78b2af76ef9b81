"""MeG end to end in one command: fitting speed, the six numbers beside the controls, serving speed, time and memory.

    python bench/meg.py --data counterfact.jsonl --folder runs/meg                  1024 edits, resumable
    python bench/meg.py --data counterfact.jsonl --folder runs/meg64 --limit 64     the quick start
    python bench/meg.py --data counterfact.jsonl --folder runs/fit --parts fit
Records 3000-4023 are edited, 9000-9999 are the development slice, and the encoder learns from 4024-8999. Stages and
results are kept in the folder, and the same command continues where it was stopped. Both sides of a speed ratio are
timed in one process, in turns, so that other load on the machine slows both.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import torch
from timing import append_row, machine_line, peak_mb, reset_peak
from torch import Tensor, nn

from fastedit.cli.meg import table
from fastedit.config import changed, parse_changes
from fastedit.methods.meg import CONFIGS, MeG, MegConfig, MegRun
from fastedit.methods.meg.config import FitConfig
from fastedit.methods.meg.fit import fit_layer, fit_neurons, fit_sequences, shared_start
from fastedit.methods.meg.neuron import NeuronForm
from fastedit.methods.meg.serve import chosen, decode
from fastedit.model.adapter import ModelAdapter
from fastedit.model.families import find
from fastedit.model.load import load_model
from fastedit.model.tokens import TokenSequence
from fastedit.records.edit import EditSet
from fastedit.records.load import load_edits


class Data(TypedDict):
    """The three sets of records, none of which shares a record with another."""

    edits: EditSet
    others: EditSet
    development: EditSet


PARTS = ("meg", "lookup", "nogate", "mlp", "fit", "serve")


def one_at_a_time(
    model: ModelAdapter, form: NeuronForm, sequence: TokenSequence, initial: Tensor, layer: int, config: FitConfig
) -> tuple[Tensor, int]:
    """The published loop with the same loss and stop: batch one, the whole model at every step, all logits, autograd.

    Returns (neuron, steps taken)."""
    flat = initial.clone().requires_grad_()
    inputs: list[Tensor] = []
    decoder = model.layers[layer]

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read, bias, write = form.split(flat[None])
        sums = inputs.pop() @ read[0] + (0 if bias is None else bias)
        return output + form.activate(sums)[..., None] * write

    gate = find(decoder, model.family.gate)
    down = find(decoder, model.family.down)
    handles = [
        gate.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        down.register_forward_hook(add),
    ]
    targets = torch.tensor(sequence.targets)
    try:
        for step in range(config.steps + 1):
            scores = model.model(input_ids=torch.tensor([sequence.ids])).logits[0, list(sequence.scored)]
            loss = torch.nn.functional.cross_entropy(scores, targets)
            done = bool((scores.argmax(1) == targets).all()) and float(loss.detach()) < config.stop_loss
            if done or step == config.steps:
                break

            (grad,) = torch.autograd.grad(loss, flat)
            rate = config.lr * (
                1 if config.optimiser == "descent" else float(loss.detach()) / float(grad.square().sum())
            )
            flat = (flat - rate * grad).detach().requires_grad_()
    finally:
        for handle in handles:
            handle.remove()
    return flat.detach(), step


def bench_fit(model: ModelAdapter, edits: EditSet, config: FitConfig, n_alone: int) -> dict[str, Any]:
    """Seconds per edit and step, together and one at a time, at the configured layer and in one of the last three."""
    results: dict[str, Any] = {}
    for layer in sorted({fit_layer(config, model.n_layers), model.n_layers - 3}):
        form = NeuronForm.of(model, config.activation)
        sequences = fit_sequences(model, [e.prompt for e in edits], [e.target_new for e in edits], config)
        initial = shared_start(model, form, sequences, layer, config, 0)
        together: list[float] = []
        alone: list[float] = []
        gap = 0.0

        begun = time.perf_counter()
        fitted = fit_neurons(model, sequences, form, initial, layer, config)
        together.append((time.perf_counter() - begun) / int(fitted.steps.sum() + len(edits)))

        for i in range(0, len(edits), max(1, len(edits) // n_alone)):
            begun = time.perf_counter()
            flat, steps = one_at_a_time(model, form, sequences[i], initial, layer, config)
            alone.append((time.perf_counter() - begun) / (steps + 1))
            gap = max(gap, float((flat - fitted.flat[i]).abs().max()))

        begun = time.perf_counter()
        fit_neurons(model, sequences, form, initial, layer, config)
        together.append((time.perf_counter() - begun) / int(fitted.steps.sum() + len(edits)))

        batched = sum(together) / len(together)
        single = sorted(alone)[len(alone) // 2]
        results[f"layer {layer}"] = {
            "ms_per_step_together": 1e3 * batched,
            "ms_per_step_alone": 1e3 * single,
            "speedup": single / batched,
            "largest_difference": gap,
            "solved": float(fitted.solved.float().mean()),
            "mean_steps": float(fitted.steps.float().mean()),
        }
        row = {"benchmark": "meg fit", "backend": "torch", "dtype": str(model.dtype)[6:], "unit": "x"}
        speedup = {"metric": "speedup over one at a time", "median": round(single / batched, 2)}
        append_row(**row, **speedup, shape=f"{len(edits)} edits, layer {layer}")
    return results


def bench_serve(meg: MeG, edits: EditSet) -> dict[str, Any]:
    """Queries per second, mixed edited and other prompts, in batches and one by one, in turns."""
    prompts = [text for e in edits for text in (e.prompt, e.locality[0].prompt)][:96]
    texts = [meg.config.fit.template.replace("{}", prompt) for prompt in prompts]
    n_tokens = meg.config.max_new_tokens
    decision = meg.server.decide(prompts)

    def decoded(batch_size: int, index: list[int]) -> Callable[[], list[str]]:
        part = chosen(decision, index)
        return lambda: decode(meg.adapter, [texts[i] for i in index], n_tokens, part, meg.server.serving, batch_size)

    begun = time.perf_counter()
    meg.server.decide(prompts)
    speeds = {"decisions_per_second": len(prompts) / (time.perf_counter() - begun)}

    some = list(range(0, len(prompts), 8))
    for name, run in (("batch_32", decoded(32, list(range(len(prompts))))), ("batch_1", decoded(1, some))):
        begun = time.perf_counter()
        count = len(run())
        speeds[f"queries_per_second_{name}"] = count / (time.perf_counter() - begun)
    return speeds


def make(meg: MeG, config: MegConfig, data: Data, folder: Path) -> MegRun:
    """Run the stages of a variant; the same edits replace themselves. Shared stages are read from the folder.

    Records that contradict an earlier record's answer to the same prompt are left out."""
    meg.config = config
    return meg.edit(data["edits"], data["others"], folder, "skip", data["development"])


def variants(config: MegConfig) -> dict[str, MegConfig]:
    """MeG and its controls, which have the same encoder and the same neurons."""
    gate = config.gate.model_copy(update={"kind": "none"})
    lookup = CONFIGS["meg-lookup"]
    return {
        "meg": config,
        "nogate": config.model_copy(update={"gate": gate}),
        "mlp": config.model_copy(update={"generator": config.generator.model_copy(update={"kind": "mlp"})}),
        "lookup": config.model_copy(update={"gate": lookup.gate, "generator": lookup.generator}),
    }


def main() -> None:
    """Read the command line, and run the parts that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CounterFact records in the flat form")
    parser.add_argument("--folder", type=Path, required=True, help="keeps stages and results")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int, default=1024, help="edits")
    parser.add_argument("--others", type=int, default=4976, help="records that the encoder learns from")
    parser.add_argument("--development", type=int, default=1000)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--set", action="append", default=[], help="a setting, as generator.epochs=500")
    options = parser.parse_args()

    data: Data = {
        "edits": load_edits(options.data, start=3000, limit=options.limit),
        "others": load_edits(options.data, start=4024, limit=options.others),
        "development": load_edits(options.data, start=9000, limit=options.development),
    }
    model = load_model(options.model, device=options.device)
    config = changed(CONFIGS["meg"], parse_changes(options.set))
    # One object for all parts, so that the base model is asked once.
    meg = MeG(model, config=config)

    path = options.folder / "results.json"
    options.folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    print(machine_line())

    for part in options.parts.split(","):
        if part not in results:
            reset_peak()
            results[part] = run_part(part, meg, config, data, options.folder)
            results[part]["peak_mb"] = peak_mb()
            path.write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"{part}: {json.dumps(results[part])}", flush=True)


def run_part(part: str, meg: MeG, config: MegConfig, data: Data, folder: Path) -> dict[str, Any]:
    """The results of one part."""
    if part == "fit":
        return bench_fit(meg.adapter, data["edits"][:64], config.fit, 8)

    run = make(meg, variants(config)["meg" if part == "serve" else part], data, folder)
    if part == "serve":
        return bench_serve(meg, data["edits"])

    before, after = meg.measure()
    print(table(before, after))
    seconds = meg.store.seconds
    for stage, spent in seconds.items():
        # A control without a gate, or without a generator, has nothing to do there.
        if spent < 0.1:
            continue
        row = {"benchmark": f"meg {part}", "backend": "torch", "dtype": str(meg.adapter.dtype)[6:], "unit": "s"}
        append_row(**row, metric=f"{stage} stage", median=round(spent, 1), shape=f"{len(run.edits)} edits")

    parameters = sum(t.numel() for name, t in meg.store.generator.items() if name.startswith("net."))
    numbers = {"unedited": before.to_dict(), "edited": after.to_dict()}
    return {**run.to_dict(), **numbers, "generator_parameters": parameters}


if __name__ == "__main__":
    main()
