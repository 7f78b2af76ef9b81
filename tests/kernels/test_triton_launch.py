"""What is said where Triton cannot run: no package, no interpreter, no device."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

ASK = """
import torch
from fastedit.ops import _dispatch
from fastedit.ops.select_neurons import SelectNeurons, select_neurons
from fastedit import kernels
score = torch.tensor([3.0, 1.0, 2.0])
print(kernels.missing())
print(_dispatch.unsupported("select_neurons", "triton", SelectNeurons(score, 1)))
print(select_neurons(score, top_k=1).tolist())
with _dispatch.backend("triton"):
    try:
        print(select_neurons(score, top_k=1).tolist())
    except _dispatch.BackendUnavailable as refusal:
        print(refusal)
"""
WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"
# As on a machine with a GPU, where Triton finds no driver: the package alone is no sign that kernels can run.
WITHOUT_DRIVER = """
from fastedit.kernels import _launch
import triton
from triton.runtime import driver
def none(): raise RuntimeError("0 active drivers ([])")
class Broken:
    def get_current_target(self): none()
driver.set_active(Broken())
print(_launch.driver_problem())
"""


def answers(code, interpret):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_without_a_device_torch_runs_and_an_explicit_choice_is_refused():
    missing, reason, automatic, refusal = answers(ASK, interpret=False)
    assert missing == "there is no CUDA device"
    assert reason.startswith("score is on cpu: Triton kernels run on CUDA devices, elsewhere with TRITON_INTERPRET=1")
    assert automatic == "[0]"
    assert reason in refusal


def test_without_the_package_the_modules_are_imported_and_say_so():
    missing, reason, automatic, refusal = answers(WITHOUT_TRITON + ASK, interpret=True)
    assert missing == reason == "Triton is not installed"
    assert automatic == "[0]"
    assert reason in refusal


def test_the_interpreter_runs_what_is_asked_for_and_is_never_the_automatic_choice():
    assert answers(ASK, interpret=True) == ["None", "None", "[0]", "[0]"]
    code = "from fastedit.kernels import select_neurons as kernel\nprint(kernel.worth(None))"
    assert answers(code, interpret=True) == ["Triton's interpreter is for tests, not for speed"]


def test_a_package_without_a_driver_is_no_backend():
    assert answers(WITHOUT_DRIVER, interpret=False) == ["Triton has no active driver: 0 active drivers ([])"]


@pytest.mark.parametrize("interpreted", [True, False])
def test_the_automatic_choice_passes_over_what_no_gpu_has_timed(monkeypatch, interpreted):
    from fastedit.kernels import _launch

    monkeypatch.setattr(_launch, "INTERPRETED", interpreted)
    assert ("interpreter" if interpreted else "no Triton kernel has been timed on a GPU") in _launch.not_worth()
